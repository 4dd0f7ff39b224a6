"""A residual network on images, to be shrunk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from fullrank.bench.shrink_images import read_cifar10, residual_net
from fullrank.bench.shrink_sizes import ShrinkSize
from fullrank.bench.shrink_subject import Subject, Values
from fullrank.bench.shrink_training import train
from fullrank.compress.targets import factorisable
from fullrank.core.batches import Batch
from fullrank.core.files import atomic_write
from fullrank.core.modes import evaluating


class ImageSubject(Subject):
    """A residual network on a part of CIFAR-10."""

    metric = "accuracy"
    grid = 1

    def __init__(self, size: ShrinkSize, folder: Path) -> None:
        self._data = read_cifar10(size.images, size.test_images)
        self._batch, self.lr = size.batch, size.lr
        torch.manual_seed(0)
        self.original = residual_net(size.channels)
        path = folder / "cifar10.safetensors"
        if path.is_file():
            self.original.load_state_dict(load_file(path))
        else:
            steps = size.epochs * len(self._data.y) // size.batch
            train(self, self.original, steps, seed=0, lr=3e-3)
            atomic_write(path, safetensors_bytes(self.original.state_dict()))
        self.original.eval()
        names = list(factorisable(self.original))
        # The first convolution and the classifier are small, and all depends on them.
        self.layers = tuple(names[1:-1])
        self.calibration = list(torch.split(self._data.x[: size.texts], size.batch))
        self.example = self._data.x_test[:32]

    @torch.no_grad()
    def values(self, model: nn.Module) -> Values:
        """See :meth:`Subject.values`."""
        with evaluating(model):
            found = torch.cat([model(x).argmax(1) for x in torch.split(self._data.x_test, 250)])
        right: Values = (found == self._data.y_test).double().numpy()
        return right

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the class."""
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    def inputs(self, batch: Any) -> Batch:
        """See :meth:`Subject.inputs`."""
        found: Tensor = batch[0]
        return found

    def training(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """See :meth:`Subject.training`."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self._data.y), generator=generator)
            # Batch statistics of a last, smaller batch would be worse ones.
            for index in torch.split(order, self._batch)[: len(order) // self._batch]:
                yield self._data.x[index], self._data.y[index]

    def ready(self, model: nn.Module) -> nn.Module:
        """Batch statistics follow the weights."""
        return model.train()
