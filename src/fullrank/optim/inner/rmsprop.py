"""RMSprop: the gradient over the root of its mean square."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.optim.foundation import Spec, State, unless
from fullrank.optim.inner.batch import Batch
from fullrank.optim.inner.moments import Moments


class RMSprop:
    """``V <- b V + (1 - b) R^2``, ``N = R / (sqrt(V) + eps)``; the step is ``lr N``.

    Centred, the root is of ``V - A^2`` with the mean A of R; with momentum, N is
    ``B <- mu B + N``. Group keys: ``lr``, ``beta``, ``eps``, ``momentum``.

    Parameters
    ----------
    momentum, centered
        Whether there is a momentum, and a mean.
    bits, min_8bit_size
        See :class:`~fullrank.optim.inner.moments.Moments`.
    """

    entrywise = True

    def __init__(
        self,
        momentum: bool = False,
        centered: bool = False,
        bits: int = 32,
        min_8bit_size: int = 4096,
    ) -> None:
        names = {"square_avg": False}
        if centered:
            names["grad_avg"] = True
        if momentum:
            names["momentum_buffer"] = True
        self.moments = Moments(names, bits, min_8bit_size)

    def expected(self, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
        """``square_avg``; ``grad_avg`` and ``momentum_buffer`` where there are any."""
        return self.moments.expected(shape, dtype)

    def direction(self, batch: Batch) -> float:
        """The normalised gradient, or its momentum."""
        group, small, out = batch.group, batch.clean(), batch.direction
        kept = {name: self.moments.load(batch, name) for name in self.moments.names}
        with unless(batch.skip, [moment for each in kept.values() for moment in each]):
            squares = kept["square_avg"]
            torch._foreach_mul_(squares, group["beta"])
            torch._foreach_addcmul_(squares, small, small, value=1.0 - group["beta"])
            torch._foreach_copy_(out, squares)
            if "grad_avg" in kept:
                means = kept["grad_avg"]
                torch._foreach_lerp_(means, small, 1.0 - group["beta"])
                torch._foreach_addcmul_(out, means, means, value=-1.0)
                # In few bits, or by rounding, the difference can come out below 0.
                torch._foreach_clamp_min_(out, 0.0)
            torch._foreach_sqrt_(out)
            torch._foreach_add_(out, group["eps"])
            if "momentum_buffer" in kept:
                buffers = kept["momentum_buffer"]
                torch._foreach_mul_(buffers, group["momentum"])
                torch._foreach_addcdiv_(buffers, small, out)
                torch._foreach_copy_(out, buffers)
            else:
                for gradient, direction in zip(small, out, strict=True):
                    torch.div(gradient, direction, out=direction)
        self.moments.save(batch, **kept)
        batch.silence()
        return float(group["lr"])

    def dense(self, batch: Batch, alpha: float, beta: float) -> bool:
        """RMSprop has no fused form here."""
        return False

    def reset(self, state: State) -> None:
        """Zero every moment."""
        self.moments.reset(state)

    def on_first_moment(self, state: State, change: Callable[[Tensor], None]) -> None:
        """Edit the mean and the momentum, where there are any."""
        for name in ("grad_avg", "momentum_buffer"):
            if name in self.moments.names:
                self.moments.edit(state, name, change)
