"""What is fine-tuned: how its data become batches, its loss, its development metric.

One class a kind of model; the loop is the same for all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.core.batches import moved
from fullrank.core.errors import InputError, require
from fullrank.core.models import load_model
from fullrank.core.modes import evaluating
from fullrank.datasets.texts import Texts, read_texts
from fullrank.training.finetune_config import FinetuneRun
from fullrank.training.finetune_data import Rows, has_fields, read_rows
from fullrank.training.lm_data import (
    LMData,
    bits_per_byte,
    check_vocabulary,
    load_lm,
    read_tokenizer,
)
from fullrank.training.processes import Processes

# No label: a position that is not predicted.
_IGNORED = -100


class Task(ABC):
    """What the loop needs to know of a kind of model.

    Attributes
    ----------
    network
        What is run in a step.
    base
        The transformers model in it, which an adapter goes on.
    metric, lower_is_better
        What is measured on the dev part.
    task_type
        PEFT's.
    rows
        What a batch is made of.
    fingerprint
        Of the data.
    counts
        Sizes of the data.
    averages_tokens
        Whether the model divides its loss by the tokens of a whole step, all its passes and
        processes, as causal language models do; others give the mean over a batch.
    """

    network: Any
    base: Any
    metric: str
    lower_is_better: bool = True
    task_type: str | None = None
    rows: Sequence[Any]
    fingerprint: str
    counts: dict[str, Any]
    averages_tokens: bool = False

    def __init__(self, run: FinetuneRun, processes: Processes) -> None:
        self.run, self.processes = run, processes
        self.autocast: torch.dtype | None = None

    @abstractmethod
    def collate(self, rows: list[Any]) -> Any:
        """Make a batch."""

    @abstractmethod
    def tokens(self, batch: Any) -> int:
        """Tokens that are trained on in a batch."""

    @abstractmethod
    def measure(self, model: Any) -> tuple[float, float | None]:
        """Return the development metric, and RankMe where there are embeddings."""

    def loss(self, model: Any, batch: Any) -> Tensor:
        """Loss of a batch, for methods that start from gradients."""
        found: Tensor = model(**batch).loss
        return found

    def calibration(self) -> Iterator[Any]:
        """Batches, in training order, for methods that start from gradients."""
        from fullrank.training.lm_trainer import SeededOrder

        order = list(SeededOrder(self.rows, self.run.loop.seed))
        # Every process takes all of a step, and finds the same start.
        size = self.run.loop.batch_size * self.processes.count
        for start in range(0, len(order), size):
            yield self.collate([self.rows[i] for i in order[start : start + size]])

    def inputs(self) -> Iterator[Any]:
        """Batches of the base's arguments, for methods that start from activations."""
        return self.calibration()

    def form(self) -> AbstractContextManager[None]:
        """Hold the network in the form it is trained in."""
        return nullcontext()

    def save_base(self, folder: Path) -> None:
        """Write the whole model, where no adapter was put on it."""
        self.network.save_pretrained(str(folder))

    def save_rest(self, folder: Path) -> None:
        """Write what belongs beside an adapter: the tokenizer."""
        self.tokenizer.save_pretrained(str(folder))

    tokenizer: Any = None


class LanguageModel(Task):
    """A causal language model on running text: bits per byte."""

    metric = "bits per byte"
    task_type = "CAUSAL_LM"
    averages_tokens = True

    def __init__(self, run: FinetuneRun, processes: Processes, texts: Texts | None) -> None:
        super().__init__(run, processes)
        self.tokenizer = read_tokenizer(run.model.name)
        texts = texts or read_texts(run.data.source, field_name=run.data.text)
        self.data = LMData.of(texts, self.tokenizer, run.data.max_tokens, run.data.dev_bytes)
        self.network = self.base = load_lm(run.model.name, None, self.tokenizer, run.model.dtype)
        _check_length(self.base, run)
        check_vocabulary(self.base, self.data.largest)
        self.rows: Any = self.data.train
        self.fingerprint = texts.fingerprint
        self.counts = {
            "name": texts.name,
            "train_tokens": len(self.data.train.ids),
            "dev_tokens": len(self.data.dev.ids),
        }

    def collate(self, rows: list[Any]) -> Any:
        """Stack sequences of one length."""
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def tokens(self, batch: Any) -> int:
        """All but the first of each sequence."""
        sequences, length = batch["labels"].shape
        return int(sequences * (length - 1))

    def measure(self, model: Any) -> tuple[float, float | None]:
        """Bits per byte of the dev part."""
        size = 4 * self.run.loop.batch_size
        return bits_per_byte(model, self.data, size, self.autocast, self.processes), None


class Completions(Task):
    """A causal language model on prompts with completions: loss on the completions."""

    metric = "loss on completions"
    task_type = "CAUSAL_LM"
    averages_tokens = True

    def __init__(self, run: FinetuneRun, processes: Processes, rows: Rows | None) -> None:
        super().__init__(run, processes)
        self.tokenizer = read_tokenizer(run.model.name)
        rows = rows or read_rows(run.data.source, (run.data.prompt, run.data.completion))
        self.network = self.base = load_lm(run.model.name, None, self.tokenizer, run.model.dtype)
        _check_length(self.base, run)
        self.rows, self.dev = (self._encoded(part, rows.name) for part in (rows.train, rows.dev))
        check_vocabulary(self.base, max(max(ids) for ids, _ in [*self.rows, *self.dev]))
        self.fingerprint = rows.fingerprint
        self.counts = {"name": rows.name, "train_rows": len(self.rows), "dev_rows": len(self.dev)}

    def _encoded(
        self, rows: Sequence[tuple[str, str]], name: str
    ) -> list[tuple[list[int], list[int]]]:
        """Token ids, and which are predicted; rows whose completion is cut off are left out."""
        end = self.tokenizer.eos_token_id
        found = []
        for prompt, completion in rows:
            asked, answer = (
                self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
                for text in (prompt, completion)
            )
            answer = [*answer, end] if end is not None else answer
            most = self.run.data.max_tokens
            ids = [*asked, *answer][:most]
            labels = [*[_IGNORED] * len(asked), *answer][:most]
            if any(label != _IGNORED for label in labels[1:]):
                found.append((ids, labels))
        if not found:
            raise InputError(
                f"no prompt of {name} leaves room for its completion in "
                f"{self.run.data.max_tokens} tokens; raise data.max_tokens"
            )
        return found

    def collate(self, rows: list[Any]) -> Any:
        """Pad to the longest."""
        pad = self.tokenizer.pad_token_id
        pad = self.tokenizer.eos_token_id if pad is None else pad
        return {
            "input_ids": _padded([ids for ids, _ in rows], 0 if pad is None else pad),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in rows], 0),
            "labels": _padded([labels for _, labels in rows], _IGNORED),
        }

    def tokens(self, batch: Any) -> int:
        """Tokens of the completions."""
        return int((batch["labels"][:, 1:] != _IGNORED).sum())

    @torch.no_grad()
    def measure(self, model: Any) -> tuple[float, float | None]:
        """Mean loss of a token of the dev completions."""
        total = _summed(self, model, self.dev, lambda batch, out: (out.loss, self.tokens(batch)))
        return float(total), None


class Classifier(Task):
    """A text classifier: accuracy."""

    metric = "accuracy"
    lower_is_better = False
    task_type = "SEQ_CLS"

    def __init__(self, run: FinetuneRun, processes: Processes, rows: Rows | None) -> None:
        super().__init__(run, processes)
        transformers = require("transformers", extra="hf")
        self.tokenizer = read_tokenizer(run.model.name)
        fields = (run.data.text, run.data.label)
        rows = rows or read_rows(run.data.source, fields, seed=run.loop.seed)
        labels = sorted({label for _, label in rows.train})
        if len(labels) < 2:
            raise InputError(f"{rows.name} has one label only, {labels[0]!r}; at least two differ")
        if unknown := {label for _, label in rows.dev} - set(labels):
            raise InputError(f"the dev part has a label {min(unknown)!r} that no train row has")
        self.number = {label: i for i, label in enumerate(labels)}
        self.rows, self.dev = list(rows.train), list(rows.dev)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        torch.manual_seed(run.loop.seed)  # of a new head

        def load(source: str) -> Any:
            return transformers.AutoModelForSequenceClassification.from_pretrained(
                source,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id=self.number,
                dtype=getattr(torch, run.model.dtype),
                ignore_mismatched_sizes=True,
            )

        self.network = self.base = load_model(run.model.name, load)
        self.base.config.pad_token_id = self.tokenizer.pad_token_id
        _check_length(self.base, run)
        self.fingerprint = rows.fingerprint
        self.counts = {
            "name": rows.name,
            "train_rows": len(self.rows),
            "dev_rows": len(self.dev),
            "labels": labels,
        }

    def collate(self, rows: list[Any]) -> Any:
        """Tokenise and pad; a text without a token is one that ends at once."""
        texts = [text for text, _ in rows]
        batch = self._tokenised(texts)
        there = batch["attention_mask"].any(1).tolist()
        if not all(there):
            end = self.tokenizer.eos_token or self.tokenizer.pad_token
            batch = self._tokenised(
                [text if any_token else end for text, any_token in zip(texts, there, strict=True)]
            )
        check_vocabulary(self.base, int(batch["input_ids"].max()))
        return {**batch, "labels": torch.tensor([self.number[label] for _, label in rows])}

    def _tokenised(self, texts: list[str]) -> Any:
        return self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=self.run.data.max_tokens,
            return_tensors="pt",
        )

    def tokens(self, batch: Any) -> int:
        """Tokens that are not padding."""
        return int(batch["attention_mask"].sum())

    @torch.no_grad()
    def measure(self, model: Any) -> tuple[float, float | None]:
        """Share of the dev texts that get their label."""

        def right(batch: Any, out: Any) -> tuple[Tensor, int]:
            hits = out.logits.argmax(-1) == batch["labels"]
            return hits.double().mean(), len(hits)

        return float(_summed(self, model, self.dev, right)), None


def make_task(run: FinetuneRun, data: Any, processes: Processes) -> Task:
    """Return the task that a run names; ``data`` are read already, or None."""
    if run.model.kind == "encoder":
        from fullrank.training.finetune_encoder import Encoding

        return Encoding(run, processes, data)
    if run.model.kind == "classifier":
        return Classifier(run, processes, data)
    fields = (run.data.prompt, run.data.completion)
    if isinstance(data, Rows) or (data is None and has_fields(run.data.source, fields)):
        return Completions(run, processes, data)
    return LanguageModel(run, processes, data)


def _summed(
    task: Task,
    model: Any,
    rows: Sequence[Any],
    value: Callable[[Any, Any], tuple[Tensor, int]],
) -> float:
    """Weighted mean over the dev rows, which several processes share."""
    device = next(model.parameters()).device
    processes, size = task.processes, 4 * task.run.loop.batch_size
    total = torch.zeros(2, dtype=torch.float64, device=device)
    starts = range(0, len(rows), size)
    with evaluating(model):
        for start in starts[processes.rank :: processes.count]:
            batch = moved(task.collate(list(rows[start : start + size])), device)
            with torch.autocast(device.type, task.autocast, enabled=task.autocast is not None):
                found, weight = value(batch, model(**batch))
            total[0] += found.double() * weight
            total[1] += weight
    mean, weight = processes.total(total).tolist()
    return float(mean / weight)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(
        [torch.tensor(row) for row in rows], batch_first=True, padding_value=value
    )


def _check_length(model: Any, run: FinetuneRun) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and run.data.max_tokens > limit:
        raise InputError(
            f"data.max_tokens={run.data.max_tokens}, but the model takes {limit} tokens"
        )
