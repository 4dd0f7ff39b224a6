"""A sentence-transformers encoder as a fine-tuning task: the ranking metric of `train encoder`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.core.models import load_sentence_transformer
from fullrank.training.config import EncoderTraining
from fullrank.training.dev import DevSet, training_parts
from fullrank.training.finetune_config import FULL, FinetuneRun
from fullrank.training.finetune_data import read_judged
from fullrank.training.finetune_tasks import Task
from fullrank.training.pairs import make_pairs
from fullrank.training.processes import Processes
from fullrank.training.quiet import training_form
from fullrank.training.ranking_loss import MaskedRankingLoss


class Encoding(Task):
    """Queries near the documents judged relevant to them."""

    lower_is_better = False
    task_type = "FEATURE_EXTRACTION"

    def __init__(self, run: FinetuneRun, processes: Processes, dataset: Any) -> None:
        from fullrank.retrieval import Encoder

        super().__init__(run, processes)
        if processes.count > 1:
            raise InputError(
                "an encoder is trained in one process; start it without torchrun or accelerate"
            )
        self.network = load_sentence_transformer(run.model.name, run.loop.device)
        self.network.to(getattr(torch, run.model.dtype))
        inner = next((m for m in self.network if hasattr(m, "auto_model")), None)
        if inner is None:
            raise InputError(f"{run.model.name} has no transformer to put an adapter on")
        self.base = inner.auto_model
        settings = EncoderTraining(
            seed=run.loop.seed,
            hard_negatives=run.data.hard_negatives,
            max_tokens=run.data.max_tokens,
            dev_tokens=run.data.max_tokens,
            metric=run.data.metric,
            dev_queries=run.data.dev_queries,
            dev_documents=run.data.dev_documents,
        )
        dataset = read_judged(run.data.source) if dataset is None else dataset
        train, dev = training_parts(dataset, run.loop.seed, needs_dev=True)
        self.pairs = make_pairs(train, hard_negatives=run.data.hard_negatives, seed=run.loop.seed)
        encoder = Encoder(self.network)
        self.dev = DevSet(dev, dataset.corpus, settings, encoder.max_tokens)
        self.metric = self.dev.name
        self.ranking = MaskedRankingLoss(self.network, self.pairs.forbidden)
        self.length = min(run.data.max_tokens, encoder.max_tokens)
        self.prompts = [encoder.prompt("query"), encoder.prompt("document")]
        self.rows = self.pairs.rows
        self.fingerprint = dataset.corpus.fingerprint
        self.counts = {
            "name": dataset.name,
            "pairs": len(self.pairs),
            "queries": len(self.pairs.queries),
            "documents": len(self.pairs.corpus),
            "dev_queries": self.dev.queries,
        }

    def collate(self, rows: list[Any]) -> Any:
        """Features of each column of texts, and the rows as labels."""
        contents = self.pairs.corpus.contents
        columns = [[self.pairs.queries[row[0]] for row in rows]]
        columns += [[contents[row[i]] for row in rows] for i in range(1, len(rows[0]))]
        features = [
            self.network.preprocess(
                texts, prompt=self.prompts[min(i, 1)] or None, max_length=self.length
            )
            for i, texts in enumerate(columns)
        ]
        return {"features": features, "labels": torch.tensor([list(row) for row in rows])}

    def tokens(self, batch: Any) -> int:
        """Tokens that are not padding."""
        return sum(int(column["attention_mask"].sum()) for column in batch["features"])

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The ranking loss; it runs the network that ``model`` is the base of."""
        found: Tensor = self.ranking(batch["features"], batch["labels"])
        return found

    def inputs(self) -> Iterator[Any]:
        """One column of texts at a time, as the base takes it."""
        for batch in self.calibration():
            for column in batch["features"]:
                names = ("input_ids", "attention_mask", "token_type_ids")
                yield {name: column[name] for name in names if name in column}

    def measure(self, model: Any) -> tuple[float, float | None]:
        """The ranking metric on the dev queries, and RankMe of the documents."""
        return self.dev.measure(model)

    def form(self) -> AbstractContextManager[None]:
        """As `train encoder`: no dropout, frozen token embeddings, plain attention on a CPU."""
        return training_form(
            self.network,
            freeze_embeddings=self.run.adapter.method == FULL,
            dropout=0.0,
            plain_attention=self.network.device.type == "cpu",
        )

    def save_base(self, folder: Path) -> None:
        """Write the whole encoder."""
        self.network.save_pretrained(str(folder), create_model_card=False)

    def save_rest(self, folder: Path) -> None:
        """Nothing: the encoder is the base's, with this adapter on its transformer."""
