"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.optim.foundation import Spec, State, unless
from fullrank.optim.inner.batch import Batch
from fullrank.optim.inner.moments import Moments


class Momentum:
    """``B <- mu B + R`` from zero, ``N = B``; the step is ``lr N``.

    Group keys: ``lr``, ``momentum``. With momentum 0 nothing is kept.

    Parameters
    ----------
    keeps
        Whether there is a momentum at all.
    bits, min_8bit_size
        See :class:`~fullrank.optim.inner.moments.Moments`.
    """

    entrywise = True

    def __init__(self, keeps: bool = True, bits: int = 32, min_8bit_size: int = 4096) -> None:
        names = {"momentum_buffer": True} if keeps else {}
        self.moments = Moments(names, bits, min_8bit_size)

    def expected(self, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
        """``momentum_buffer``, or nothing."""
        return self.moments.expected(shape, dtype)

    def direction(self, batch: Batch) -> float:
        """The momentum, or the gradient itself."""
        small = batch.clean()
        if self.moments.names:
            buffers = self.moments.load(batch, "momentum_buffer")
            with unless(batch.skip, buffers):
                torch._foreach_mul_(buffers, batch.group["momentum"])
                torch._foreach_add_(buffers, small)
                torch._foreach_copy_(batch.direction, buffers)
            self.moments.save(batch, momentum_buffer=buffers)
        else:
            torch._foreach_copy_(batch.direction, small)
        batch.silence()
        return float(batch.group["lr"])

    def dense(self, batch: Batch, alpha: float, beta: float) -> bool:
        """Not written: three passes are all there is to save."""
        return False

    def reset(self, state: State) -> None:
        """Zero the momentum."""
        self.moments.reset(state)

    def on_first_moment(self, state: State, change: Callable[[Tensor], None]) -> None:
        """Edit the momentum."""
        if self.moments.names:
            self.moments.edit(state, "momentum_buffer", change)
