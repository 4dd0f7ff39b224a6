"""scikit-learn's digits, turned by 90 degrees, for an MLP that knows them upright."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.core.errors import require
from fullrank.core.modes import evaluating
from fullrank.training.finetune_config import FinetuneRun
from fullrank.training.finetune_tasks import Task
from fullrank.training.processes import Processes

Data = tuple[Tensor, Tensor]
# Train, dev and test images.
_PARTS = (1100, 300, 397)
_BASE_STEPS, _BASE_LR, _BASE_BATCH = 400, 3e-3, 64


class MLP(nn.Module):
    """64-128-128-10, called as transformers' models are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> Any:
        """Return logits ``(N, 10)``, and the loss where there are labels."""
        outputs = require("transformers", extra="hf").modeling_outputs
        logits = self.c(self.b(self.a(pixels).relu()).relu())
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return outputs.SequenceClassifierOutput(loss=loss, logits=logits)


@functools.cache
def digits(turned: bool) -> tuple[Data, Data, Data]:
    """Return the train, dev and test part: pixels ``(N, 64)`` in [0, 1] and labels ``(N,)``."""
    datasets = require("sklearn.datasets", extra="demo")
    images, labels = datasets.load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 8, 8) / 16
    x = (x.rot90(dims=(1, 2)) if turned else x).reshape(-1, 64)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, dev, test = ((x[rows], y[rows]) for rows in torch.split(order, list(_PARTS)))
    return train, dev, test


@functools.cache
def upright_model() -> MLP:
    """Return the MLP after training on the upright digits; not to be changed."""
    (x, y), _, _ = digits(turned=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = MLP()
        optimizer = torch.optim.AdamW(model.parameters(), lr=_BASE_LR)
        for _ in range(_BASE_STEPS):
            rows = torch.randint(len(x), (_BASE_BATCH,))
            model(x[rows], y[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return model


class TurnedDigits(Task):
    """Turned digits: the loss on the dev part."""

    metric = "dev loss"

    def __init__(self, run: FinetuneRun, processes: Processes) -> None:
        super().__init__(run, processes)
        self.network = self.base = copy.deepcopy(upright_model())
        train, self.dev, _ = digits(turned=True)
        self.rows = list(zip(*train, strict=True))
        self.fingerprint = "scikit-learn's digits, turned"
        self.counts = {"train_rows": len(self.rows), "dev_rows": len(self.dev[0])}

    def collate(self, rows: list[Any]) -> Any:
        """Stack images and labels."""
        return {
            "pixels": torch.stack([x for x, _ in rows]),
            "labels": torch.stack([y for _, y in rows]),
        }

    def tokens(self, batch: Any) -> int:
        """Images."""
        return len(batch["labels"])

    def inputs(self) -> Iterator[Any]:
        """Images without labels."""
        for batch in self.calibration():
            yield {"pixels": batch["pixels"]}

    @torch.no_grad()
    def measure(self, model: Any) -> tuple[float, float | None]:
        """Cross-entropy of the dev part."""
        x, y = (part.to(next(model.parameters()).device) for part in self.dev)
        with evaluating(model):
            return float(model(x, labels=y).loss), None

    def save_base(self, folder: Path) -> None:
        """Write all weights."""
        save_file = require("safetensors.torch", extra="hf").save_file
        save_file(self.network.state_dict(), folder / "model.safetensors")


@torch.no_grad()
def accuracy(model: Any, part: Data) -> float:
    """Share of the images that get their label."""
    x, y = (values.to(next(model.parameters()).device) for values in part)
    with evaluating(model):
        return float((model(x).logits.argmax(-1) == y).double().mean())
