"""The kinds of model that `fullrank shrink` takes: what they calibrate on and what is measured."""

from __future__ import annotations

import json
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fullrank.cli.shrink_floor import ACCURACY, LOSSES, Floor
from fullrank.cli.shrink_metrics import Accuracy, LanguageMetric, Metric, longest_input
from fullrank.core.errors import InputError

if TYPE_CHECKING:
    from fullrank.datasets import Dataset
    from fullrank.datasets.texts import Texts
    from fullrank.training.finetune_data import Rows

Part = Literal["dev", "test"]

# Of a language model: sequences to measure on, in tokens, and how much of a part, in bytes.
_CONTEXT, _MEASURED = 256, 200_000
# Of checkpoints that are used as encoders without it.
_SPARE_HEADS = ("", "ForMaskedLM", "ForPreTraining")
_BATCH = {"encoder": 32, "classifier": 32, "language model": 8}


class Task(ABC):
    """One kind of model with its data.

    Attributes
    ----------
    model, tokenizer
        As loaded; the model in float32 where its checkpoint is in half precision.
    dtype
        Of the checkpoint.
    kind
        In words.
    """

    kind: str
    model: Any
    dtype: Any = None
    tokenizer: Any = None

    @abstractmethod
    def default_texts(self, samples: int, seed: int) -> list[str]:
        """Texts of the data's train part to calibrate on; none without data."""

    @abstractmethod
    def metric(self, floor: Floor, part: Part) -> Metric | None:
        """What to measure on a part; None where the data has no such part."""

    def clusters(self, metric: Any, part: Part) -> list[Any] | None:
        """Labels of the metric's values that belong together."""
        return None

    def batches(self, texts: Sequence[str], max_length: int, at_least: int = 1) -> list[Any]:
        """Turn texts into the model's inputs, so many batches if they suffice, and labels."""
        from fullrank.compress import Batches

        longest: int | None = max_length
        if self.tokenizer is not None:
            longest = longest_input(self.model, self.tokenizer, max_length)
        made = Batches(
            self.model,
            list(texts),
            batch_size=self._batch_size(texts, at_least),
            max_length=longest,
            tokenizer=self.tokenizer,
        )
        return list(made)

    def _batch_size(self, texts: Sequence[str], at_least: int) -> int:
        return max(1, min(_BATCH[self.kind], len(texts) // at_least))

    def work_in_float32(self) -> None:
        """Take a model of half precision to the numbers that it is worked on in."""
        import torch

        self.dtype = next(p.dtype for p in self.model.parameters() if p.is_floating_point())
        if self.dtype in (torch.float16, torch.bfloat16):
            self.model.float()

    def as_stored(self, small: Any) -> Any:
        """Give a shrunk model the checkpoint's own numbers, in place."""
        # Buffers stay: those of positions are made in float32 at loading, whatever the weights.
        for parameter in small.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self.dtype)
        return small

    def usage(self, folder: Path) -> str:
        """How to load the result."""
        return f"SentenceTransformer({str(folder)!r})"

    def finish(self, folder: Path) -> None:
        """Write what the model needs beside its weights."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    def identity(self) -> str:
        """What tells these data from others."""
        return ""


class Encoder(Task):
    """A sentence encoder, measured by retrieval."""

    kind = "encoder"

    def __init__(self, name: str, data: str | None) -> None:
        from fullrank.core.models import load_sentence_transformer
        from fullrank.datasets import read_dataset

        self.model = load_sentence_transformer(name)
        self.dataset: Dataset | None = None if data is None else read_dataset(data)
        self._data = data

    def default_texts(self, samples: int, seed: int) -> list[str]:
        """Half documents, half queries where there are queries to learn from."""
        data, draw = self.dataset, random.Random(seed)
        if data is None:
            return []
        # A data set without parts has only queries to measure on, which must not be seen here.
        queries = list(data.split("train").queries.values()) if data.parts else []
        documents = list(data.corpus.contents)
        chosen = draw.sample(queries, min(samples // 2, len(queries)))
        return chosen + draw.sample(documents, min(samples - len(chosen), len(documents)))

    def metric(self, floor: Floor, part: Part) -> Metric | None:
        """Retrieval over the whole collection."""
        data = self.dataset
        if data is None:
            raise InputError("--floor needs judged queries: pass --data")
        if data.parts and part in data.parts:
            data = data.split(part)
        elif part == "test":
            return None
        elif data.parts:
            raise InputError(f"{self._data} has no dev part to choose a plan on")
        from fullrank.retrieval import RankingMetric

        return RankingMetric(
            floor.metric, data.corpus, data.queries, data.qrels, exclude=data.exclude
        )

    def clusters(self, metric: Any, part: Part) -> list[Any] | None:
        """Of the queries."""
        data, queries = self.dataset, getattr(metric, "queries", None)
        if data is None or queries is None:
            return None
        found = (data.split(part) if data.parts else data).clusters
        return [found[q] for q in queries] if found else None

    def identity(self) -> str:
        """Name of the collection."""
        return str(self._data)


class LanguageModel(Task):
    """A causal language model, measured by how well it predicts text."""

    kind = "language model"

    def __init__(self, name: str, data: str | None) -> None:
        from fullrank.core.errors import require
        from fullrank.core.models import load_model
        from fullrank.datasets.texts import read_texts
        from fullrank.training.lm_data import read_tokenizer

        self.texts: Texts | None = None if data is None else read_texts(data)
        self.tokenizer = _padded(read_tokenizer(name))
        auto = require("transformers", extra="hf").AutoModelForCausalLM
        self.model = load_model(name, partial(auto.from_pretrained, dtype="auto")).eval()

    def default_texts(self, samples: int, seed: int) -> list[str]:
        """Passages of the train part."""
        if self.texts is None:
            return []
        passages = [p for text in self.texts.parts["train"] for p in _passages(text)]
        return random.Random(seed).sample(passages, min(samples, len(passages)))

    def batches(self, texts: Sequence[str], max_length: int, at_least: int = 1) -> list[Any]:
        """With the inputs as labels; padding has none."""
        made = super().batches(texts, max_length, at_least)
        for batch in made:
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return made

    def metric(self, floor: Floor, part: Part) -> Metric | None:
        """Bits per byte, or perplexity."""
        from fullrank.training.lm_data import Blocks, encode, first_bytes

        if floor.metric not in LOSSES.values():
            raise InputError(
                f"{floor.metric!r} is not measured on a language model; use 'bits per byte<=103%' "
                "or 'perplexity<=103%', or --metric"
            )
        if self.texts is None:
            raise InputError("--floor needs text to measure on: pass --data")
        if part not in self.texts.parts:
            return None
        documents = first_bytes(self.texts.parts[part], _MEASURED)
        ids = encode(self.tokenizer, documents)
        longest = getattr(self.model.config, "max_position_embeddings", None) or _CONTEXT
        blocks = Blocks(ids, min(_CONTEXT, longest), rest=True)
        if len(blocks) < 2:
            raise InputError(
                f"the {part} part of {self.texts.name} has {len(ids)} tokens, too few to measure on"
            )
        size = sum(len(text.encode()) for text in documents)
        return LanguageMetric(blocks, size / len(ids), floor.metric == "perplexity")

    def usage(self, folder: Path) -> str:
        """As transformers loads it."""
        return f"AutoModelForCausalLM.from_pretrained({str(folder)!r})"

    def identity(self) -> str:
        """Of the texts."""
        return "" if self.texts is None else self.texts.fingerprint


class Classifier(Task):
    """A classifier of texts, measured by accuracy on labelled ones."""

    kind = "classifier"

    def __init__(self, name: str, data: str | None) -> None:
        from fullrank.core.errors import require
        from fullrank.core.models import load_model
        from fullrank.training.finetune_data import read_rows
        from fullrank.training.lm_data import read_tokenizer

        fields = ("text", "label")
        self.rows: Rows | None = None if data is None else read_rows(data, fields, seed=0)
        auto = require("transformers", extra="hf").AutoModelForSequenceClassification
        self.tokenizer = _padded(read_tokenizer(name))
        self.model = load_model(name, partial(auto.from_pretrained, dtype="auto")).eval()
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        numbers = {str(k): int(v) for k, v in self.model.config.label2id.items()}
        # Data may name classes, or number them.
        self._number = {**{str(n): n for n in numbers.values()}, **numbers}

    def default_texts(self, samples: int, seed: int) -> list[str]:
        """Texts of the train part."""
        texts = [] if self.rows is None else [text for text, _ in self.rows.train]
        return random.Random(seed).sample(texts, min(samples, len(texts)))

    def batches(self, texts: Sequence[str], max_length: int, at_least: int = 1) -> list[Any]:
        """With their labels, where all of a batch's are known."""
        made = super().batches(texts, max_length, at_least)
        known = {} if self.rows is None else dict(self.rows.train)
        ordered = sorted(texts, key=len)  # as Batches has them
        if all(text in known for text in ordered):
            import torch

            labels = torch.tensor([self._label(known[text]) for text in ordered])
            size = self._batch_size(texts, at_least)
            for i, batch in enumerate(made):
                batch["labels"] = labels[i * size : (i + 1) * size].to(batch["input_ids"].device)
        return made

    def metric(self, floor: Floor, part: Part) -> Metric | None:
        """Accuracy: half of the held-out rows to choose on, half to test on."""
        if floor.metric.lower() != ACCURACY:
            raise InputError(
                f"{floor.metric!r} is not measured on a classifier; use 'accuracy>=98%', or "
                "--metric"
            )
        if self.rows is None:
            raise InputError("--floor needs labelled texts: pass --data (JSONL: text, label)")
        rows = [(text, self._label(label)) for text, label in self.rows.dev]
        half = rows[::2] if part == "dev" else rows[1::2]
        if len(half) < 2:
            raise InputError(
                f"{self.rows.name} has {len(rows)} texts to measure on; at least four are needed"
            )
        return Accuracy(half, self.tokenizer)

    def _label(self, label: str) -> int:
        if label not in self._number:
            known = ", ".join(list(self._number)[:6])
            raise InputError(f"the data's label {label!r} is none of the model's ({known}, ...)")
        return self._number[label]

    def usage(self, folder: Path) -> str:
        """As transformers loads it."""
        return f"AutoModelForSequenceClassification.from_pretrained({str(folder)!r})"

    def identity(self) -> str:
        """Of the rows."""
        return "" if self.rows is None else self.rows.fingerprint


def open_task(name: str, data: str | None) -> Task:
    """Load a model as what it is: an encoder, a language model or a classifier."""
    from fullrank.core.models import head_of, model_kind

    kinds: dict[str, Callable[[str, str | None], Task]] = {
        kind.kind: kind for kind in (Encoder, LanguageModel, Classifier)
    }
    kind, head = model_kind(name), head_of(name)
    if kind == Encoder.kind and head not in _SPARE_HEADS:
        raise InputError(
            f"{name} is a model {head}, and its head would be lost: sentence encoders, causal "
            "language models and text classifiers are shrunk here. In Python, "
            "fullrank.compress.greenformers and lord_compress take any model"
        )
    task = kinds[kind](name, data)
    task.work_in_float32()
    return task


def read_calibration(path: Path) -> list[str]:
    """Read texts: .txt (one a line) or .jsonl (field ``text``)."""
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path}: calibration texts come as .txt or .jsonl")
    try:
        # JSON strings may hold what str.splitlines takes for the end of a line.
        lines = path.read_text(encoding="utf-8").split("\n")
        texts = [
            json.loads(x)["text"] if path.suffix == ".jsonl" else x for x in lines if x.strip()
        ]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as calibration texts: {error}") from error
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path} holds no texts")
    return texts


def _padded(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise InputError("the model's tokenizer has neither a padding nor an end token")
    return tokenizer


def _passages(text: str, size: int = 1500) -> list[str]:
    """Cut a text that runs on, so that calibration sees more than its beginning."""
    return [text[i : i + size] for i in range(0, len(text), size) if text[i : i + size].strip()]
