"""Small images and small networks: scikit-learn's digits, and a part of CIFAR-10.

Not a benchmark: what ``shrink_pela.py``, ``shrink_trp.py`` and ``shrink_maestro.py`` share.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fullrank.bench.shrink_images import read_cifar10


class Images(NamedTuple):
    """Train and test images with their labels."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor

    def classes(self, wanted: Sequence[int]) -> Images:
        """Images of some classes only."""
        keep, keep_test = (torch.isin(y, torch.tensor(wanted)) for y in (self.y, self.y_test))
        return Images(self.x[keep], self.y[keep], self.x_test[keep_test], self.y_test[keep_test])

    def flat(self) -> Images:
        """Images as vectors."""
        return self._replace(x=self.x.flatten(1), x_test=self.x_test.flatten(1))


def digits(seed: int = 0) -> Images:
    """1,797 images of 8 x 8, a quarter of them for the test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    x = torch.tensor(data.images[order] / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target[order])
    cut = len(y) * 3 // 4
    return Images(x[:cut], y[:cut], x[cut:], y[cut:])


def cifar(folder: Path, train: int, test: int) -> Images:
    """The first images of the CIFAR-10 subset, normalised by channel."""
    return Images(*read_cifar10(train, test, folder))


def batches(
    x: Tensor, y: Tensor, epochs: int, seed: int, size: int = 64
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """``(step, inputs, labels)`` in a new order each epoch."""
    generator = torch.Generator().manual_seed(seed)
    step = 0
    for _ in range(epochs):
        for index in torch.randperm(len(y), generator=generator).split(size):
            yield step, x[index], y[index]
            step += 1


def steps(examples: int, epochs: int, size: int = 64) -> int:
    """How many batches that is."""
    return epochs * math.ceil(examples / size)


def fit(
    model: nn.Module,
    data: Images,
    epochs: int,
    optimizer: torch.optim.Optimizer,
    seed: int = 0,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
) -> nn.Module:
    """Train; by default on the cross-entropy."""
    model.train()
    for _, x, y in batches(data.x, data.y, epochs, seed):
        optimizer.zero_grad()
        value = loss(model, x, y) if loss else nn.functional.cross_entropy(model(x), y)
        value.backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """On the test images, in evaluation mode."""
    model.eval()
    right = sum(
        int((model(x).argmax(1) == y).sum())
        for x, y in zip(data.x_test.split(500), data.y_test.split(500), strict=True)
    )
    return right / len(data.y_test)


def mean_and_spread(values: Sequence[float], spec: str = ".3f") -> str:
    """``mean ± standard deviation`` over seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{spec}} ± {spread:{spec}}"
