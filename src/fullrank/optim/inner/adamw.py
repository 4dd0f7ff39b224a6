"""Adam's moments and direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from fullrank.optim.foundation import Spec, State
from fullrank.optim.inner.batch import Batch
from fullrank.optim.inner.moments import Moments

EpsMode = Literal["uncorrected", "corrected"]

FUSED_DEVICES = ("cpu", "cuda")
"""Where torch has fused kernels that we have tried."""

# Both betas to this power are 0: an age at which Adam corrects nothing.
_ENDLESS = 1e9


class AdamW:
    """Adam's moments and direction, in 32 (or the weight's 64) or 8 bits.

    Parameters
    ----------
    eps_mode
        ``"uncorrected"``: ``N = M / (sqrt(V) + eps)``, ``s = lr sqrt(1 - b2^t) / (1 - b1^t)``
        (GaLore, Fira and LIFT's code); ``"corrected"``: eps beside the bias-corrected root, as in
        ``torch.optim.AdamW`` (FRUGAL).
    bits, min_8bit_size
        See :class:`~fullrank.optim.inner.moments.Moments`.
    """

    entrywise = True

    def __init__(
        self, eps_mode: EpsMode = "uncorrected", bits: int = 32, min_8bit_size: int = 4096
    ) -> None:
        self.eps_mode = eps_mode
        self.moments = Moments({"exp_avg": True, "exp_avg_sq": False}, bits, min_8bit_size)

    def expected(self, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
        """``exp_avg`` and ``exp_avg_sq``; in 8 bits each with its ``_absmax``."""
        return self.moments.expected(shape, dtype)

    def direction(self, batch: Batch) -> float | Tensor:
        """Adam's direction; see the class for eps."""
        means, squares = (self.moments.load(batch, name) for name in ("exp_avg", "exp_avg_sq"))
        if batch.direction[0].device.type in FUSED_DEVICES:
            size = self._by_kernel(batch, means, squares)
        else:
            size = self._by_foreach(batch, means, squares)
        self.moments.save(batch, exp_avg=means, exp_avg_sq=squares)
        return size

    def _by_kernel(
        self, batch: Batch, means: list[Tensor], squares: list[Tensor]
    ) -> float | Tensor:
        group = batch.group
        # torch's kernel subtracts `lr / (1 - b1^t) * M / (sqrt(V) / sqrt(1 - b2^t) + eps)` from
        # its parameter. From zero, with this lr and eps, that leaves exactly +N; where the step is
        # skipped, zero.
        torch._foreach_zero_(batch.direction)
        lr, eps, steps = -1.0, group["eps"], self._steps(batch)
        if self.eps_mode == "uncorrected" and isinstance(batch.age, Tensor):
            steps = [torch.full_like(steps[0], _ENDLESS)] * len(steps)
        elif self.eps_mode == "uncorrected":
            age = float(batch.age)
            root = self._root(group, age)
            lr, eps = -self._first(group, age) / root, eps / root
        self._kernel(batch, batch.direction, means, squares, steps, lr=lr, eps=eps, decay=0.0)
        return self._size(group, batch)

    @staticmethod
    def _steps(batch: Batch) -> list[Tensor]:
        """One age a matrix, as the kernel wants it."""
        if isinstance(batch.age, Tensor):
            return list(batch.age.float().clamp_min(1.0).unbind())
        device = batch.small[0].device
        return [torch.full((), batch.age, device=device)] * len(batch.small)

    def _kernel(
        self,
        batch: Batch,
        params: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        steps: list[Tensor],
        *,
        lr: float,
        eps: float,
        decay: float,
    ) -> None:
        group, skip = batch.group, batch.skip
        torch._fused_adamw_(
            params,
            batch.small,
            means,
            squares,
            [],
            steps,
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
            found_inf=None if skip is None else skip.float(),
        )

    @staticmethod
    def _first(group: dict[str, Any], age: float) -> float:
        return float(1.0 - group["betas"][0] ** age)

    @staticmethod
    def _root(group: dict[str, Any], age: float) -> float:
        return math.sqrt(1.0 - group["betas"][1] ** age)

    def _size(self, group: dict[str, Any], batch: Batch) -> float | Tensor:
        lr = float(group["lr"])
        if self.eps_mode == "corrected" or not group.get("correct_bias", True):
            return lr
        if not isinstance(batch.age, Tensor):
            return lr * self._root(group, batch.age) / self._first(group, batch.age)
        b1, b2 = group["betas"]
        ages = batch.age.to(batch.states_dtype).clamp_min(1.0)
        size: Tensor = (1.0 - b2**ages).sqrt_().div_(1.0 - b1**ages).mul_(lr)
        return size

    def _by_foreach(
        self, batch: Batch, means: list[Tensor], squares: list[Tensor]
    ) -> float | Tensor:
        """The same in tensor arithmetic, where there is no kernel."""
        group, skip = batch.group, batch.skip
        b1, b2 = group["betas"]
        for mean, square, small, out, age in zip(
            means, squares, batch.clean(), batch.direction, batch.ages(), strict=True
        ):
            mean.add_((small - mean) * batch.unless(1.0 - b1, mean))
            square.add_((small * small - square) * batch.unless(1.0 - b2, square))
            first, root = 1.0 - b1**age, (1.0 - b2**age) ** 0.5
            if self.eps_mode == "corrected":
                out.copy_((mean / first) / (square.sqrt() / root + group["eps"]))
            else:
                out.copy_(mean / (square.sqrt() + group["eps"]))
            if skip is not None:
                out.mul_(~skip)
        return self._size(group, batch)

    def dense(self, batch: Batch, alpha: float, beta: float) -> bool:
        """Fused over weights, gradients and moments, where they are plain and of one dtype."""
        if batch.weights[0].device.type not in FUSED_DEVICES:
            return False
        if isinstance(batch.age, Tensor) and self.eps_mode == "uncorrected":
            return False  # eps would depend on an age that the host does not know
        means, squares = ([s[k] for s in batch.states] for k in ("exp_avg", "exp_avg_sq"))
        dtype = batch.weights[0].dtype
        everything = (*batch.weights, *batch.small, *means, *squares)
        if not all(t.dtype == dtype and t.is_contiguous() for t in everything):
            return False
        lr, eps = alpha * float(batch.group["lr"]), batch.group["eps"]
        if self.eps_mode == "uncorrected":
            assert not isinstance(batch.age, Tensor)
            eps /= self._root(batch.group, batch.age)
            if not batch.group.get("correct_bias", True):
                lr *= self._first(batch.group, batch.age) / self._root(batch.group, batch.age)
        if lr == 0.0 and beta != 1.0:
            return False
        decay = (1.0 - beta) / lr if lr else 0.0
        steps = self._steps(batch)
        self._kernel(batch, batch.weights, means, squares, steps, lr=lr, eps=eps, decay=decay)
        return True

    def reset(self, state: State) -> None:
        """Zero both moments."""
        self.moments.reset(state)

    def on_first_moment(self, state: State, change: Callable[[Tensor], None]) -> None:
        """Edit ``exp_avg``."""
        self.moments.edit(state, "exp_avg", change)
