"""What the layers of one MKOR share, and what its arguments may be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fullrank.core.errors import InputError
from fullrank.optim import checks as valid
from fullrank.optim.gradients import NonFinite
from fullrank.optim.mkor_factors import Rule, check_rule

Rescale = Literal["sum", "joint"]
Scale = float | Tensor | Callable[[], float | Tensor]
Inner = Optimizer | Callable[[list[nn.Parameter]], Optimizer] | None


@dataclass(slots=True)
class Settings:
    """What the layers of one optimizer share; see :class:`~fullrank.optim.MKOR`."""

    rule: Rule
    blend: float
    zeta: float
    threshold: float
    clip: float
    factor_dtype: torch.dtype
    rescale: Rescale
    grad_scale: Scale
    accumulation_steps: int
    row_mask: Tensor | None = None

    def scale(self) -> float | Tensor:
        """The factor that is on the gradients of this backward pass."""
        scale = self.grad_scale
        return scale() if callable(scale) else scale

    def check(self) -> None:
        """Raise :class:`InputError` on a value out of range."""
        check_rule(self.rule, self.blend)
        valid.positive("threshold", self.threshold)
        valid.positive("clip", self.clip)
        valid.one_of(*get_args(Rescale))("rescale", self.rescale)
        valid.whole("accumulation_steps", self.accumulation_steps)
        if not isinstance(self.zeta, int | float) or not 0 <= self.zeta <= 1:
            raise InputError(f"zeta={self.zeta!r}; it must lie in [0, 1]")
        dtype = self.factor_dtype
        if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InputError(f"factor_dtype={dtype!r}; it must be a floating-point dtype")
        if not isinstance(self.grad_scale, Tensor) and not callable(self.grad_scale):
            valid.positive("grad_scale", self.grad_scale)


def check_schedule(inv_freq: Any, warmup_steps: Any, nonfinite: Any) -> None:
    """Raise :class:`InputError` on a schedule that is none."""
    valid.whole("inv_freq", inv_freq)
    valid.one_of(*get_args(NonFinite))("nonfinite", nonfinite)
    if not valid.is_whole(warmup_steps) or warmup_steps < 0:
        raise InputError(f"warmup_steps={warmup_steps!r}; it must be a whole number >= 0")


def check_model(model: nn.Module) -> None:
    """Only whole, real weights can be preconditioned.

    Raises
    ------
    InputError
        On anything else, and where the model is none.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"model is a {type(model).__name__}; it must be an nn.Module")
    for name, param in model.named_parameters():
        if type(param).__name__ in ("DTensor", "FlatParameter"):
            raise InputError(
                f"parameter {name!r} is a {type(param).__name__}: MKOR needs whole weights; "
                "use DDP instead of FSDP"
            )
        if param.is_complex():
            raise InputError(
                f"parameter {name!r} is of {param.dtype}; only real weights are stepped"
            )


def make_inner(model: nn.Module, optimizer: Inner) -> Optimizer:
    """Return the inner optimizer that was given, made by a function, or torch's SGD.

    Raises
    ------
    InputError
        When it is no optimizer, or makes none.
    """
    if optimizer is None:
        optimizer = torch.optim.SGD
    made = optimizer
    if not isinstance(optimizer, Optimizer):
        if not callable(optimizer):
            raise InputError(
                f"optimizer={optimizer!r}; it must be an optimizer, a function from a list of "
                "parameters to one, or None"
            )
        made = optimizer([p for p in model.parameters() if p.requires_grad])
    if not isinstance(made, Optimizer):
        raise InputError(f"the inner optimizer is a {type(made).__name__}, which is none")
    return made
