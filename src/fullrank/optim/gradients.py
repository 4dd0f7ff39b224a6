"""Are the gradients finite, and which of them can a subspace be fitted to?"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim.sharded import agree, is_sharded, local

NonFinite = Literal["skip", "raise", "ignore"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a look at all gradients of a step has found.

    Attributes
    ----------
    skip_all
        The host knows that this step must be left out.
    usable
        Which gradients have a subspace: finite, and not all zero. Where nobody has looked, True.
    skip
        Where only the device knows: one bool scalar a device, the same on all.
    """

    skip_all: bool
    usable: list[bool]
    skip: dict[torch.device, Tensor] = field(default_factory=dict)


def host_decides(device: torch.device) -> bool:
    """Whether reading a number from this device costs nothing."""
    return device.type == "cpu"


def norms(grads: Sequence[Tensor]) -> list[Tensor]:
    """Euclidean norm of each gradient as a scalar, in float32 at least.

    It is finite exactly when the gradient is, as far as its squares fit the dtype: a float32
    gradient of norm 2e19 counts as infinite.
    """
    found: list[Tensor] = [torch.empty(0)] * len(grads)
    for members in _alike(grads):
        values: Sequence[Tensor] = _norms([local(grads[i]) for i in members])
        if any(is_sharded(grads[i]) for i in members):
            # In float64, which the squares of float32 norms fit.
            squares = torch.stack(list(values)).double().square_()
            values = agree(squares, [grads[i] for i in members]).sqrt_().unbind()
        for i, value in zip(members, values, strict=True):
            found[i] = value
    return found


def _norms(grads: Sequence[Tensor]) -> Sequence[Tensor]:
    """The same of gradients of one device and dtype that are in one place."""
    dtype = grads[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    if dtype == wide and host_decides(grads[0].device) and all(g.is_contiguous() for g in grads):
        # BLAS reads memory faster than the kernel for norms, by a third.
        flat = [grad.view(-1) for grad in grads]
        return torch.stack([torch.dot(g, g) for g in flat]).sqrt_().unbind()
    values: Sequence[Tensor] = torch._foreach_norm(list(grads), 2, dtype=wide)
    return values


def _alike(tensors: Sequence[Tensor]) -> Iterable[list[int]]:
    """Which of these have their device and dtype in common."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, tensor in enumerate(tensors):
        kinds.setdefault((tensor.device, tensor.dtype), []).append(i)
    return kinds.values()


def check_dense(grad: Tensor, name: Callable[[], str]) -> None:
    """Raise :class:`~fullrank.core.InputError` on a sparse gradient; ``name`` says whose."""
    if grad.layout != torch.strided:
        raise InputError(
            f"{name()} has a sparse gradient; use a dense one "
            "(sparse=False in nn.Embedding) or torch.optim.SparseAdam for it"
        )


def judge(
    grads: Sequence[Tensor],
    due: Sequence[bool],
    nonfinite: NonFinite,
    name: Callable[[int], str],
    measure: Callable[[Sequence[Tensor]], Sequence[Tensor]] = norms,
) -> Verdict:
    """Look at the gradients of a step, as far as anybody needs to know.

    Parameters
    ----------
    grads
        The gradients, of any device and dtype.
    due
        For which of them a subspace is about to be fitted.
    nonfinite
        As in :class:`~fullrank.optim.SubspaceOptimizer`.
    name
        What to call gradient ``i`` in a message.
    measure
        How to find the norms of the gradients, each finite exactly when its gradient is.

    Raises
    ------
    InputError
        With ``nonfinite="raise"``, when a gradient is not finite.

    Examples
    --------
    >>> judge([torch.ones(2), torch.tensor([float("nan")])], [False, False], "skip", str).skip_all
    True
    """
    if nonfinite == "ignore" and not any(due):
        return Verdict(False, [True] * len(grads))
    found = measure(grads)
    waits = nonfinite != "skip" or any(due) or all(host_decides(g.device) for g in grads)
    if not waits:
        return Verdict(False, [True] * len(grads), _flags(found))
    values = _read(found)
    bad = [i for i, value in enumerate(values) if not math.isfinite(value)]
    if bad and nonfinite == "raise":
        more = f" (and {len(bad) - 1} more)" if len(bad) > 1 else ""
        raise InputError(
            f"the gradient of {name(bad[0])}{more} holds NaN or infinity; nothing was changed. "
            "Look for the cause, or leave such steps out with nonfinite='skip'"
        )
    usable = [math.isfinite(value) and value > 0 for value in values]
    return Verdict(bool(bad) and nonfinite == "skip", usable)


def _read(values: Sequence[Tensor]) -> list[float]:
    """Bring scalars to the host, waiting once a device and dtype."""
    read = [0.0] * len(values)
    for members in _alike(values):
        together = torch.stack([values[i] for i in members]).tolist()
        for i, value in zip(members, together, strict=True):
            read[i] = value
    return read


def _flags(values: Sequence[Tensor]) -> dict[torch.device, Tensor]:
    """True on every device when any value on any device is not finite."""
    devices: dict[torch.device, list[Tensor]] = {}
    for value in values:
        devices.setdefault(value.device, []).append(value.float())
    each = [~torch.isfinite(torch.stack(list(v))).all() for v in devices.values()]
    anywhere = torch.stack([flag.to(each[0].device) for flag in each]).any()
    return {device: anywhere.to(device) for device in devices}
