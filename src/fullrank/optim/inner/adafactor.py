"""Adafactor's factored second moment."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fullrank.optim.foundation import Spec, State
from fullrank.optim.inner.batch import Batch
from fullrank.optim.inner.moments import Moments


class Adafactor:
    """Adafactor's factored second moment, with an optional first moment.

    Group keys: ``eps`` (a pair), ``clip_threshold``, ``decay_rate``, ``beta1`` (or None),
    ``scale_parameter``, ``relative_step``, ``warmup_init`` as in the original (arXiv 1804.04235).

    Parameters
    ----------
    first_moment
        Whether there is one, over the updates.
    bits, min_8bit_size
        See :class:`~fullrank.optim.inner.moments.Moments`; of vectors too. The factors stay as
        they are: there is nothing to save.
    """

    entrywise = False

    def __init__(self, first_moment: bool, bits: int = 32, min_8bit_size: int = 4096) -> None:
        self.first_moment = first_moment
        self._mean = Moments({"exp_avg": True}, bits, min_8bit_size)
        self._square = Moments({"exp_avg_sq": False}, bits, min_8bit_size)

    def expected(self, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
        """Row and column means of the squares for matrices, all squares otherwise."""
        found: Spec
        if len(shape) >= 2:
            found = {
                "exp_avg_sq_row": (shape[:-1], dtype),
                "exp_avg_sq_col": ((*shape[:-2], shape[-1]), dtype),
            }
        else:
            found = self._square.expected(shape, dtype)
        return {**self._mean.expected(shape, dtype), **found} if self.first_moment else found

    def direction(self, batch: Batch) -> float | Tensor:
        """The clipped, scaled update. The learning rate is in it, so s is 1."""
        group, skip = batch.group, batch.skip
        eps, clip = group["eps"][0], group["clip_threshold"]
        batch.lr = []
        for weight, small, out, state, age in zip(
            batch.weights, batch.clean(), batch.direction, batch.states, batch.ages(), strict=True
        ):
            keep = batch.unless(age ** group["decay_rate"], out)
            self._scale(small, eps, out, state, keep, skip)
            rms = torch.linalg.vector_norm(out) / math.sqrt(out.numel())
            out.div_((rms / clip).clamp_(min=1.0))
            lr = self._rate(group, age)
            if group["scale_parameter"]:
                norm = torch.linalg.vector_norm(weight, dtype=out.dtype)
                lr = (norm / math.sqrt(weight.numel())).clamp_(min=group["eps"][1]) * lr
            out.mul_(lr)
            batch.lr.append(lr)
            if self.first_moment:
                mean = self._mean.get(state, "exp_avg").to(out.dtype)
                mean.lerp_(out, batch.unless(1.0 - group["beta1"], out))
                out.copy_(mean)
                self._mean.put(state, "exp_avg", mean, skip)
        # Not a product: the factored moments of a matrix without history are 0.
        batch.silence()
        return 1.0

    @staticmethod
    def _rate(group: dict[str, Any], age: float | Tensor) -> float | Tensor:
        if not group["relative_step"]:
            return float(group["lr"])
        if isinstance(age, Tensor):
            least = age * 1e-6 if group["warmup_init"] else torch.full_like(age, 1e-2)
            return torch.minimum(least, age.rsqrt())
        return min(age * 1e-6 if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(age))

    def _scale(
        self,
        small: Tensor,
        eps: float,
        out: Tensor,
        state: State,
        weight: float | Tensor,
        skip: Tensor | None,
    ) -> None:
        square = small.square().add_(eps)
        if "exp_avg_sq" in state:
            mean = self._square.get(state, "exp_avg_sq").to(out.dtype).lerp_(square, weight)
            torch.mul(mean.rsqrt(), small, out=out)
            self._square.put(state, "exp_avg_sq", mean, skip)
            return
        row = state["exp_avg_sq_row"].lerp_(square.mean(dim=-1), weight)
        col = state["exp_avg_sq_col"].lerp_(square.mean(dim=-2), weight)
        torch.mul(small, (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1), out=out)
        out.mul_(col.rsqrt().unsqueeze(-2))

    def dense(self, batch: Batch, alpha: float, beta: float) -> bool:
        """Adafactor has no fused form."""
        return False

    def reset(self, state: State) -> None:
        """Zero every moment."""
        for name, value in state.items():
            if name.startswith("exp_avg") and value.dtype != torch.uint8:
                value.zero_()
        for moments in (self._mean, self._square):
            for name in moments.names:
                if name in state:
                    moments.reset(state)

    def on_first_moment(self, state: State, change: Callable[[Tensor], None]) -> None:
        """Edit ``exp_avg`` where there is one."""
        if "exp_avg" in state:
            self._mean.edit(state, "exp_avg", change)
