"""What is shrunk: a trained model with its data, its metric and its fine-tuning loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fullrank.core.batches import Batch

Values = npt.NDArray[np.float64]


class Subject(ABC):
    """A trained model, and all that is needed to shrink it and to tell how good it is.

    Attributes
    ----------
    original
        The model; nothing may change it.
    metric, lower_is_better
        What :meth:`values` is of.
    layers
        Names of the layers that all methods may shrink.
    calibration
        Batches for what looks at data.
    example
        A batch to time and count a forward pass on.
    grid
        Ranks that a method is free to choose are multiples of it.
    lr
        Peak learning rate of fine-tuning.
    clusters
        A label for each value, where values hang together.
    """

    metric: str
    lower_is_better = False
    grid = 8
    lr: float
    clusters: Sequence[Hashable] | None = None
    original: nn.Module
    layers: tuple[str, ...]
    calibration: list[Batch]
    example: Batch

    @abstractmethod
    def values(self, model: nn.Module) -> Values:
        """Return the metric of each query, image or sequence."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what fine-tuning minimises."""

    @abstractmethod
    def training(self, seed: int) -> Iterator[Any]:
        """Yield batches for :meth:`loss`, without end."""

    def inputs(self, batch: Any) -> Batch:
        """Return a training batch without its target."""
        found: Batch = batch
        return found

    def ready(self, model: nn.Module) -> nn.Module:
        """Put a model into the mode that it is fine-tuned in: without dropout."""
        return model.eval()

    def cosine(self, model: nn.Module) -> float | None:
        """Return the mean cosine of its embeddings with the original's; None without any."""
        return None
