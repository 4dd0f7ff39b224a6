"""How the optimizer sees one parameter: as a matrix with a subspace, or whole."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim.foundation import Spec, State
from fullrank.optim.inner import InnerUpdate
from fullrank.optim.outside import OutsideRule
from fullrank.optim.row_norm import Reparametrisation
from fullrank.optim.sharded import gathered
from fullrank.optim.whole import Identity, Nothing


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Read a weight of two or more dimensions as ``(out, rest)``.

    >>> matrix_shape((64, 3, 7, 7))
    (64, 147)
    """
    return shape[0], math.prod(shape[1:])


@dataclass(slots=True)
class Parts:
    """What the matrices of a group are stepped with.

    Attributes
    ----------
    inner
        The rule inside the subspace.
    outside
        The rule outside; None leaves that part of the gradient out.
    reparam, magnitudes
        Another way to write the weight, and the rule for its magnitudes; or None.
    scale, scale_whole
        What the way back multiplies by, and what is not projected is multiplied by.
    """

    inner: InnerUpdate
    outside: OutsideRule | None = None
    reparam: Reparametrisation | None = None
    magnitudes: InnerUpdate | None = None
    scale: float = 1.0
    scale_whole: float = 1.0


@dataclass(slots=True)
class Slot:
    """What the optimizer knows of a parameter beside its state; rebuilt at will.

    Attributes
    ----------
    param, group, place
        The parameter, its group, and (group's index, index in the group).
    parts
        What it is stepped with.
    subspace
        The whole space, nothing, or the current choice; its tensors are those in the state.
    shape
        ``(m, n)`` where the parameter is seen as a matrix, or None.
    moments_dtype
        float32 for weights in half precision, otherwise the weight's.
    small_size
        Elements of the small array.
    attached
        Whether ``subspace`` shares the state's tensors.
    """

    param: Tensor
    group: dict[str, Any]
    place: tuple[int, int]
    parts: Parts
    subspace: Any
    shape: tuple[int, int] | None
    moments_dtype: torch.dtype
    small_shape: tuple[int, ...]
    small_size: int
    attached: bool = False

    @property
    def projected(self) -> bool:
        """Whether there is a subspace to be chosen."""
        return not isinstance(self.subspace, Identity | Nothing)

    @property
    def scale(self) -> float:
        """What a step is multiplied by beside the learning rate."""
        return self.parts.scale if self.projected else self.parts.scale_whole

    @property
    def inner(self) -> InnerUpdate:
        """The rule inside."""
        return self.parts.inner

    @property
    def outside(self) -> OutsideRule | None:
        """The rule outside, where there is an outside."""
        return None if isinstance(self.subspace, Identity) else self.parts.outside

    @property
    def spreads(self) -> bool:
        """Whether everything is done number by number, so that each process can do its own."""
        if self.shape is not None or not self.inner.entrywise:
            return False
        kept = self.expected().values()
        whole = tuple(self.param.shape)
        return all(shape == whole and dtype.is_floating_point for shape, dtype in kept)

    def matrix(self, tensor: Tensor) -> Tensor:
        """Read a weight or a gradient as the matrix that is projected."""
        return tensor if self.shape in (None, tensor.shape) else tensor.reshape(self.shape or ())

    def expected(self) -> Spec:
        """Shape and dtype of the moments, the bases, and what else the parts keep."""
        spec: Spec = {}
        if self.small_size or not isinstance(self.subspace, Nothing):
            spec.update(self.inner.expected(self.small_shape, self.moments_dtype))
        if self.shape is not None:
            spec.update(self.subspace.expected(self.shape, self.param.dtype))
        if self.outside is not None:
            spec.update(self.outside.expected(self.moments_dtype))
        if self.reparam is not None:
            assert self.shape is not None
            assert self.parts.magnitudes is not None
            rows = self.shape[0]
            spec.update(self.reparam.expected(rows, self.shape, self.moments_dtype))
            moments = self.parts.magnitudes.expected((rows, 1), self.moments_dtype)
            spec.update({f"magnitude_{name}": value for name, value in moments.items()})
        return spec

    @property
    def reparam(self) -> Reparametrisation | None:
        """Another way to write the weight, for what is seen as a matrix."""
        return None if self.shape is None else self.parts.reparam

    def fill(self, state: State) -> None:
        """Give new state its first values."""
        self.attached = False
        if self.outside is not None:
            self.outside.fill(state)
        if self.reparam is not None:
            self.reparam.fill(self.matrix(gathered(self.param)), state)

    def attach(self, state: State) -> None:
        """Take the bases from the state, which gets them back as they are laid out here."""
        self.subspace = self.subspace.restore(state)
        state.update(self.subspace.state)
        self.attached = True

    def magnitude_state(self, state: State) -> State:
        """The magnitudes' moments, under the names their rule knows."""
        prefix = "magnitude_"
        return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}

    def own_state(self, state: State) -> list[Tensor]:
        """What the outside rule or the reparametrisation writes to."""
        names: Spec = {} if self.outside is None else self.outside.expected(self.moments_dtype)
        if self.reparam is not None:
            assert self.shape is not None
            names = self.reparam.expected(self.shape[0], self.shape, self.moments_dtype)
        return [state[name] for name in names]


def make_slot(
    param: Tensor,
    group: dict[str, Any],
    place: tuple[int, int],
    parts: Parts,
    subspace: Any,
) -> Slot:
    """Work out sizes. Only what is projected, or rewritten, is seen as a matrix."""
    shape = None
    small_shape: tuple[int, ...] = tuple(param.shape)
    whole = isinstance(subspace, Identity | Nothing)
    rewrites = parts.reparam is not None and parts.reparam.whole and param.dim() > 0
    if not whole or rewrites:
        shape = matrix_shape(param.shape) if param.dim() > 1 else (1, param.numel())
        small_shape = shape
    if not isinstance(subspace, Identity):
        small_shape = subspace.small_shape(shape or param.shape)
    return Slot(
        param=param,
        group=group,
        place=place,
        parts=parts,
        subspace=subspace,
        shape=shape,
        moments_dtype=torch.promote_types(param.dtype, torch.float32),
        small_shape=small_shape,
        small_size=math.prod(small_shape),
    )


def announce_unprojected(group: dict[str, Any], ranks: Sequence[int | None]) -> None:
    """Warn when a group asks for a rank that vectors cannot have."""
    vectors = [
        p for p, r in zip(group["params"], ranks, strict=True) if r is not None and p.dim() < 2
    ]
    if vectors:
        warnings.warn(
            f"{len(vectors)} parameters of a group with a rank have fewer than two dimensions "
            f"(the first of shape {tuple(vectors[0].shape)}); they are stepped without projection",
            stacklevel=6,
        )


def check_ranks(group: dict[str, Any], ranks: Sequence[int | None]) -> None:
    """Raise :class:`InputError` on a rank that is larger than what it is for.

    One rank for all may be too large for some matrices of its group, which are then stepped
    whole, but not for all of them; one that was given for a matrix may not be too large for it.
    """
    sides = {
        i: (rank, min(matrix_shape(param.shape)), tuple(param.shape))
        for i, (param, rank) in enumerate(zip(group["params"], ranks, strict=True))
        if rank is not None and param.dim() > 1 and param.numel()
    }
    large = [(i, *found) for i, found in sides.items() if found[0] > found[1]]
    listed = isinstance(group.get("rank"), list | tuple)
    if large and (listed or len(large) == len(sides)):
        i, rank, side, shape = large[0]
        name = repr(group["param_names"][i]) if "param_names" in group else str(i)
        raise InputError(
            f"rank={rank} is larger than parameter {name} of shape {shape} has, whose rank is at "
            f"most {side}; give a smaller rank, or None for no projection"
        )
