"""A causal language model, to be shrunk."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fullrank.bench.shrink_sizes import ShrinkSize
from fullrank.bench.shrink_subject import Subject, Values
from fullrank.compress.targets import factorisable
from fullrank.core.batches import Batch
from fullrank.core.modes import evaluating


class LMSubject(Subject):
    """A causal language model over bytes, trained as `fullrank train lm` does."""

    metric = "bits per byte"
    lower_is_better = True

    def __init__(self, source: str, size: ShrinkSize, folder: Path) -> None:
        from fullrank.bench.lm_jobs import sampled
        from fullrank.bench.sizes import Size
        from fullrank.datasets.texts import read_texts
        from fullrank.training.lm import train_lm
        from fullrank.training.lm_config import LMTraining
        from fullrank.training.lm_data import BYTES, LMData, read_tokenizer

        shape = Size(
            *("shrink", size.width, size.layers, size.heads, size.context, size.batch),
            steps=size.pretraining,
            evaluations=2,
            dev_bytes=size.dev_bytes,
        )
        data = {"tokenizer": BYTES, "context": size.context + 1, "dev_bytes": 2 * size.dev_bytes}
        run = LMTraining.of(
            {
                "model": {"config": shape.model()},
                "data": data,
                "optimizer": {"name": "adamw", "lr": 1e-3},
                "loop": {
                    "steps": size.pretraining,
                    "batch_size": size.batch,
                    "evaluations": shape.evaluations,
                    "device": "cpu",
                },
            }
        )
        texts = sampled(read_texts(source), size.dev_bytes)
        trained = train_lm(run, texts=texts, out=folder / f"lm-{texts.name}", progress=False)
        self.original = trained.model
        self.layers = tuple(factorisable(self.original))
        found = LMData.of(texts, read_tokenizer(BYTES), size.context + 1, 2 * size.dev_bytes)
        self._train, self._batch, self.lr = found.train, size.batch, size.lr
        whole = [
            block["input_ids"] for block in found.dev if len(block["input_ids"]) > size.context
        ]
        self._dev = torch.split(torch.stack(whole), size.batch)
        self._bits = float(np.log(2)) * found.bytes_per_token
        draw = self.training(seed=-1)
        self.calibration = [
            {"input_ids": next(draw)} for _ in range(max(2, size.texts // size.batch))
        ]
        self.example = {"input_ids": self._dev[0][:8]}

    @torch.no_grad()
    def values(self, model: nn.Module) -> Values:
        """See :meth:`Subject.values`."""
        with evaluating(model):
            found = [self._nats(model, ids).mean(1) for ids in self._dev]
        bits: Values = torch.cat(found).double().numpy() / self._bits
        return bits

    def _nats(self, model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids[:, :-1]).logits
        return nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the next byte."""
        return self._nats(model, batch).mean()

    def inputs(self, batch: Any) -> Batch:
        """See :meth:`Subject.inputs`."""
        return {"input_ids": batch}

    def training(self, seed: int) -> Iterator[Tensor]:
        """See :meth:`Subject.training`."""
        draw = random.Random(seed)
        while True:
            chosen = draw.sample(range(len(self._train)), self._batch)
            yield torch.stack([self._train[i]["input_ids"] for i in chosen])
