"""Inner updates: the stateful rule that runs inside a subspace (or on the whole gradient).

An inner update sees the small arrays of several matrices at once, as lists, so that one kernel
does the elementwise work of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from fullrank.optim.quantize import BLOCK, Blockwise

State = dict[str, Any]
EpsMode = Literal["uncorrected", "corrected"]

# Where torch has a fused Adam kernel that we have tried.
_FUSED_DEVICES = ("cpu", "cuda")


@dataclass(slots=True)
class Batch:
    """Matrices that are stepped together: same device, same moments' dtype, same age.

    Attributes
    ----------
    group
        The param group: learning rate and the rest.
    age
        Steps that the moments have seen, this one included: one number for all, or one element a
        matrix on the device where the host does not know it.
    weights
        The ``(m, n)`` views of the weights.
    small
        What ``down`` gave. Inner updates do not write to it.
    direction
        Where the inner update writes; shapes of ``small``, the moments' dtype.
    states
        The optimizer's state of each matrix.
    skip
        None, or a bool scalar on the device: True leaves every moment as it is.
    lr
        The learning rate that decoupled decay uses, where an inner update changes it by matrix.
    """

    group: dict[str, Any]
    age: float | Tensor
    weights: list[Tensor] = field(default_factory=list)
    small: list[Tensor] = field(default_factory=list)
    direction: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    skip: Tensor | None = None
    lr: list[float | Tensor] | None = None

    def ages(self) -> Sequence[float | Tensor]:
        """One age a matrix; at least 1, where corrections for the age are defined."""
        if not isinstance(self.age, Tensor):
            return [self.age] * len(self.small)
        # A matrix that never had a good step has age 0.
        return self.age.to(self.direction[0].dtype).clamp_min(1.0).unbind()


class InnerUpdate(Protocol):
    """A stateful rule on small arrays."""

    def expected(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each state tensor for a small array of this shape."""
        ...

    def direction(self, batch: Batch) -> float | Tensor:
        """Update the moments, write each direction N, return s: the step is ``-s * up(N)``."""
        ...

    def dense(self, batch: Batch, alpha: float, beta: float) -> bool:
        """Do ``W <- beta W - alpha s N`` in one pass over everything, if this rule can.

        ``batch.small`` are then the gradients themselves. False means that nothing was done.
        """
        ...

    def reset(self, state: State) -> None:
        """Zero the moments of one matrix."""
        ...

    def on_first_moment(self, state: State, change: Callable[[Tensor], None]) -> None:
        """Let ``change`` edit the first moment of one matrix in place."""
        ...


def _plain(tensor: Tensor) -> bool:
    return tensor.is_contiguous()


class AdamW:
    """Adam's moments and direction, in 32 (or the weight's 64) or 8 bits.

    Parameters
    ----------
    eps_mode
        ``"uncorrected"``: ``N = M / (sqrt(V) + eps)``, ``s = lr sqrt(1 - b2^t) / (1 - b1^t)``
        (GaLore, Fira and LIFT's code); ``"corrected"``: eps beside the bias-corrected root, as in
        ``torch.optim.AdamW`` (FRUGAL).
    bits
        8 stores moments as codes with one float32 maximum per 256 elements; arrays smaller than
        ``min_8bit_size`` stay as they are (arXiv 2110.02861).
    min_8bit_size
        4096, as bitsandbytes.
    """

    def __init__(
        self, eps_mode: EpsMode = "uncorrected", bits: int = 32, min_8bit_size: int = 4096
    ) -> None:
        self.eps_mode = eps_mode
        self.bits = bits
        self.min_8bit_size = min_8bit_size

    def _quantised(self, numel: int) -> bool:
        return self.bits == 8 and numel >= self.min_8bit_size

    def expected(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """``exp_avg`` and ``exp_avg_sq``; in 8 bits each with its ``_absmax``."""
        if not self._quantised(numel := math.prod(shape)):
            return {"exp_avg": (shape, dtype), "exp_avg_sq": (shape, dtype)}
        blocks = (-(-numel // BLOCK),)
        return {
            "exp_avg": (shape, torch.uint8),
            "exp_avg_absmax": (blocks, torch.float32),
            "exp_avg_sq": (shape, torch.uint8),
            "exp_avg_sq_absmax": (blocks, torch.float32),
        }

    def direction(self, batch: Batch) -> float | Tensor:
        """Adam's direction; see the class for eps."""
        means, squares = self._moments(batch.states, batch.direction[0].dtype)
        if isinstance(batch.age, Tensor) or batch.direction[0].device.type not in _FUSED_DEVICES:
            size = self._by_foreach(batch, means, squares)
        else:
            size = self._by_kernel(batch, means, squares)
        self._store(batch, means, squares)
        return size

    def _by_kernel(self, batch: Batch, means: list[Tensor], squares: list[Tensor]) -> float:
        age = float(batch.age)
        root = self._root(batch.group, age)
        # torch's kernel subtracts `lr / (1 - b1^t) * M / (sqrt(V) / sqrt(1 - b2^t) + eps)` from
        # its parameter. From zero, with this lr and eps, that leaves exactly +N.
        torch._foreach_zero_(batch.direction)
        lr = -1.0 if self.eps_mode == "corrected" else -self._first(batch.group, age) / root
        self._kernel(batch, batch.direction, means, squares, lr=lr, decay=0.0)
        return self._size(batch.group, age)

    def _kernel(
        self,
        batch: Batch,
        params: list[Tensor],
        means: list[Tensor],
        squares: list[Tensor],
        lr: float,
        decay: float,
    ) -> None:
        group, age = batch.group, float(batch.age)
        eps = group["eps"]
        if self.eps_mode == "uncorrected":
            eps = eps / self._root(group, age)
        step = torch.full((), age, dtype=torch.float32, device=params[0].device)
        torch._fused_adamw_(
            params,
            batch.small,
            means,
            squares,
            [],
            [step] * len(params),
            lr=lr,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=decay,
            eps=eps,
            amsgrad=False,
            maximize=False,
        )

    @staticmethod
    def _first(group: dict[str, Any], age: float) -> float:
        return float(1.0 - group["betas"][0] ** age)

    @staticmethod
    def _root(group: dict[str, Any], age: float) -> float:
        return math.sqrt(1.0 - group["betas"][1] ** age)

    def _size(self, group: dict[str, Any], age: float) -> float:
        lr = float(group["lr"])
        if self.eps_mode == "corrected" or not group.get("correct_bias", True):
            return lr
        return lr * self._root(group, age) / self._first(group, age)

    def _by_foreach(
        self, batch: Batch, means: list[Tensor], squares: list[Tensor]
    ) -> float | Tensor:
        """The same in tensor arithmetic, where the age or the skip is known to the device only."""
        group, skip = batch.group, batch.skip
        b1, b2 = group["betas"]
        keep1: float | Tensor = 1.0 - b1
        keep2: float | Tensor = 1.0 - b2
        if skip is not None:
            keep1, keep2 = keep1 * ~skip, keep2 * ~skip
        sizes: list[float | Tensor] = []
        for mean, square, small, out, age in zip(
            means, squares, batch.small, batch.direction, batch.ages(), strict=True
        ):
            s = small if skip is None else torch.where(skip, 0.0, small)
            mean.add_((s - mean) * keep1)
            square.add_((s * s - square) * keep2)
            first, root = 1.0 - b1**age, (1.0 - b2**age) ** 0.5
            if self.eps_mode == "corrected":
                out.copy_((mean / first) / (square.sqrt() / root + group["eps"]))
            else:
                out.copy_(mean / (square.sqrt() + group["eps"]))
            if skip is not None:
                out.mul_(~skip)
            sizes.append(root / first)
        lr = float(group["lr"])
        if self.eps_mode == "corrected" or not group.get("correct_bias", True):
            return lr
        if isinstance(batch.age, Tensor):
            return torch.stack([torch.as_tensor(size) for size in sizes]) * lr
        return float(sizes[0]) * lr

    def dense(self, batch: Batch, alpha: float, beta: float) -> bool:
        """Fused over weights, gradients and moments, where they are plain and of one dtype."""
        if isinstance(batch.age, Tensor) or batch.weights[0].device.type not in _FUSED_DEVICES:
            return False
        means, squares = ([s[k] for s in batch.states] for k in ("exp_avg", "exp_avg_sq"))
        dtype = batch.weights[0].dtype
        everything = (*batch.weights, *batch.small, *means, *squares)
        if not all(t.dtype == dtype and _plain(t) for t in everything):
            return False
        age = float(batch.age)
        step = alpha * self._size(batch.group, age)
        if step == 0.0 and beta != 1.0:
            return False
        lr = step
        if self.eps_mode == "uncorrected":
            lr *= self._first(batch.group, age) / self._root(batch.group, age)
        decay = (1.0 - beta) / lr if lr else 0.0
        self._kernel(batch, batch.weights, means, squares, lr=lr, decay=decay)
        return True

    def _moments(
        self, states: Sequence[State], dtype: torch.dtype
    ) -> tuple[list[Tensor], list[Tensor]]:
        return (
            [_load(state, "exp_avg", signed=True).to(dtype) for state in states],
            [_load(state, "exp_avg_sq", signed=False).to(dtype) for state in states],
        )

    @staticmethod
    def _store(batch: Batch, means: list[Tensor], squares: list[Tensor]) -> None:
        for state, mean, square in zip(batch.states, means, squares, strict=True):
            _save(state, "exp_avg", mean, signed=True, skip=batch.skip)
            _save(state, "exp_avg_sq", square, signed=False, skip=batch.skip)

    def reset(self, state: State) -> None:
        """Zero both moments."""
        for name, signed in (("exp_avg", True), ("exp_avg_sq", False)):
            _save(state, name, _load(state, name, signed).zero_(), signed)

    def on_first_moment(self, state: State, change: Callable[[Tensor], None]) -> None:
        """Edit ``exp_avg``."""
        mean = _load(state, "exp_avg", signed=True)
        change(mean)
        _save(state, "exp_avg", mean, signed=True)


def _load(state: State, name: str, signed: bool) -> Tensor:
    stored: Tensor = state[name]
    if stored.dtype != torch.uint8:
        return stored
    return Blockwise(signed).decode(stored, state[f"{name}_absmax"])


def _save(state: State, name: str, value: Tensor, signed: bool, skip: Tensor | None = None) -> None:
    codes, absmax = state[name], state.get(f"{name}_absmax")
    if absmax is None:
        return
    if skip is None:
        Blockwise(signed).encode(value.float(), codes, absmax)
        return
    # Encoding what was decoded is no identity: the lowest code means a little more than -1.
    new = torch.empty_like(codes), torch.empty_like(absmax)
    Blockwise(signed).encode(value.float(), *new)
    codes.copy_(torch.where(skip, codes, new[0]))
    absmax.copy_(torch.where(skip, absmax, new[1]))


def _unless(skip: Tensor | None, weight: float | Tensor, like: Tensor) -> float | Tensor:
    """How much of the new value an average takes: nothing where the step is skipped."""
    if skip is None:
        return weight
    return torch.where(skip, 0.0, torch.as_tensor(weight, dtype=like.dtype, device=like.device))


class Adafactor:
    """Adafactor's factored second moment, with an optional first moment.

    Group keys: ``eps`` (a pair), ``clip_threshold``, ``decay_rate``, ``beta1`` (or None),
    ``scale_parameter``, ``relative_step``, ``warmup_init`` as in the original (arXiv 1804.04235).
    """

    def __init__(self, first_moment: bool) -> None:
        self.first_moment = first_moment

    def expected(
        self, shape: tuple[int, ...], dtype: torch.dtype
    ) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Row and column means of the squares for matrices, all squares otherwise."""
        found: dict[str, tuple[tuple[int, ...], torch.dtype]]
        if len(shape) >= 2:
            found = {
                "exp_avg_sq_row": (shape[:-1], dtype),
                "exp_avg_sq_col": ((*shape[:-2], shape[-1]), dtype),
            }
        else:
            found = {"exp_avg_sq": (shape, dtype)}
        return {"exp_avg": (shape, dtype), **found} if self.first_moment else found

    def direction(self, batch: Batch) -> float | Tensor:
        """The clipped, scaled update. The learning rate is in it, so s is 1."""
        group, skip = batch.group, batch.skip
        eps, clip = group["eps"][0], group["clip_threshold"]
        batch.lr = []
        for weight, gradient, out, state, age in zip(
            batch.weights, batch.small, batch.direction, batch.states, batch.ages(), strict=True
        ):
            small = gradient if skip is None else torch.where(skip, 0.0, gradient)
            keep = _unless(skip, age ** group["decay_rate"], out)
            self._scale(small.square().add_(eps), small, out, state, keep)
            rms = torch.linalg.vector_norm(out) / math.sqrt(out.numel())
            out.div_((rms / clip).clamp_(min=1.0))
            lr = self._rate(group, age)
            if group["scale_parameter"]:
                norm = torch.linalg.vector_norm(weight, dtype=out.dtype)
                lr = (norm / math.sqrt(weight.numel())).clamp_(min=group["eps"][1]) * lr
            out.mul_(lr)
            batch.lr.append(lr)
            if self.first_moment:
                state["exp_avg"].lerp_(out, _unless(skip, 1.0 - group["beta1"], out))
                out.copy_(state["exp_avg"])
            if skip is not None:
                # Not a product: the factored moments of a matrix without history are 0.
                out.copy_(torch.where(skip, 0.0, out))
        return 1.0

    @staticmethod
    def _rate(group: dict[str, Any], age: float | Tensor) -> float | Tensor:
        if not group["relative_step"]:
            return float(group["lr"])
        if isinstance(age, Tensor):
            least = age * 1e-6 if group["warmup_init"] else torch.full_like(age, 1e-2)
            return torch.minimum(least, age.rsqrt())
        return min(age * 1e-6 if group["warmup_init"] else 1e-2, 1.0 / math.sqrt(age))

    @staticmethod
    def _scale(
        square: Tensor, small: Tensor, out: Tensor, state: State, weight: float | Tensor
    ) -> None:
        if "exp_avg_sq" in state:
            torch.mul(state["exp_avg_sq"].lerp_(square, weight).rsqrt(), small, out=out)
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
            if name.startswith("exp_avg"):
                value.zero_()

    def on_first_moment(self, state: State, change: Callable[[Tensor], None]) -> None:
        """Edit ``exp_avg`` where there is one."""
        if "exp_avg" in state:
            change(state["exp_avg"])
