"""Lion: the sign of an interpolated first moment (arXiv 2302.06675)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.optim.foundation import Spec, State, unless
from fullrank.optim.inner.batch import Batch
from fullrank.optim.inner.moments import Moments


class Lion:
    """``N = sign(b1 M + (1 - b1) R)``, then ``M <- b2 M + (1 - b2) R``; the step is ``lr N``.

    Group keys: ``lr``, ``betas``.

    Parameters
    ----------
    bits, min_8bit_size
        See :class:`~fullrank.optim.inner.moments.Moments`.
    """

    entrywise = True

    def __init__(self, bits: int = 32, min_8bit_size: int = 4096) -> None:
        self.moments = Moments({"exp_avg": True}, bits, min_8bit_size)

    def expected(self, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
        """``exp_avg``."""
        return self.moments.expected(shape, dtype)

    def direction(self, batch: Batch) -> float:
        """A sign for each number: the step has the learning rate's size everywhere."""
        b1, b2 = batch.group["betas"]
        means = self.moments.load(batch, "exp_avg")
        small = batch.clean()
        with unless(batch.skip, means):
            for mean, gradient, out in zip(means, small, batch.direction, strict=True):
                torch.lerp(mean, gradient, 1.0 - b1, out=out).sign_()
            torch._foreach_lerp_(means, small, 1.0 - b2)
        self.moments.save(batch, exp_avg=means)
        batch.silence()
        return float(batch.group["lr"])

    def dense(self, batch: Batch, alpha: float, beta: float) -> bool:
        """Lion has no fused form."""
        return False

    def reset(self, state: State) -> None:
        """Zero the moment."""
        self.moments.reset(state)

    def on_first_moment(self, state: State, change: Callable[[Tensor], None]) -> None:
        """Edit ``exp_avg``."""
        self.moments.edit(state, "exp_avg", change)
