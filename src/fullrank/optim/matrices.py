"""How the optimizer sees one parameter: as a matrix with a subspace, or whole."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim.inner import InnerUpdate, State
from fullrank.optim.subspace import Identity, Projection

Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]
MakeSubspace = Callable[[dict[str, Any], int, tuple[int, int]], Projection]


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """Read a weight of two or more dimensions as ``(out, rest)``.

    >>> matrix_shape((64, 3, 7, 7))
    (64, 147)
    """
    return shape[0], math.prod(shape[1:])


@dataclass(slots=True)
class Slot:
    """What the optimizer knows of a parameter beside its state; rebuilt at will.

    Attributes
    ----------
    param, group, place
        The parameter, its group, and (group's index, index in the group).
    inner
        The inner update of its group.
    subspace
        The identity, or the current projection; its tensors are those in the state.
    moments_dtype
        float32 for weights in half precision, otherwise the weight's.
    small_size
        Elements of the small array.
    fitted
        Whether the projection has a basis yet.
    attached
        Whether ``subspace`` shares the state's tensors.
    """

    param: Tensor
    group: dict[str, Any]
    place: tuple[int, int]
    inner: InnerUpdate
    subspace: Any
    moments_dtype: torch.dtype
    small_shape: tuple[int, ...]
    small_size: int
    projected: bool
    fitted: bool = False
    attached: bool = False

    def matrix(self, tensor: Tensor) -> Tensor:
        """Read a weight or a gradient as the matrix that is projected."""
        if not self.projected or tensor.dim() == 2:
            return tensor
        return tensor.reshape(matrix_shape(tensor.shape))

    def write_back(self, weight: Tensor) -> None:
        """Copy an updated matrix to the parameter, where it could not be a view of it."""
        if weight.data_ptr() != self.param.data_ptr():
            self.param.copy_(weight.view(self.param.shape))

    def expected(self) -> Spec:
        """Shape and dtype of the moments and the bases."""
        spec = self.inner.expected(self.small_shape, self.moments_dtype)
        if self.projected:
            bases = self.subspace.expected(matrix_shape(self.param.shape))
            spec.update({name: (shape, self.param.dtype) for name, shape in bases.items()})
        return spec

    def attach(self, state: State) -> None:
        """Take the bases from the state."""
        if self.projected:
            self.subspace = self.subspace.restore(state)
            self.fitted = all(bool(basis.any()) for basis in self.subspace.state.values())
        self.attached = True

    def injected(self, given: Tensor | tuple[Tensor, Tensor], name: str) -> Projection:
        """Return the projection on bases that a caller chose, checked."""
        expected = self.subspace.expected(matrix_shape(self.param.shape))
        bases = given if isinstance(given, tuple) else (given,)
        shapes = [tuple(basis.shape) for basis in bases]
        if shapes != list(expected.values()):
            raise InputError(
                f"projection_hook gave bases of shape {shapes} for {name}; "
                f"side {self.subspace.side!r} needs {list(expected.values())}"
            )
        dtype, device = self.param.dtype, self.param.device
        found: Projection = self.subspace.restore(
            {
                n: b.detach().to(device, dtype).contiguous()
                for n, b in zip(expected, bases, strict=True)
            }
        )
        return found


def make_slot(
    param: Tensor,
    group: dict[str, Any],
    rank: int | None,
    place: tuple[int, int],
    inner: InnerUpdate,
    make_subspace: MakeSubspace,
) -> Slot:
    """Decide how a parameter is seen: only a rank below both sides of a matrix saves anything."""
    subspace: Any = Identity()
    small_shape: tuple[int, ...] = tuple(param.shape)
    projected = rank is not None and param.dim() >= 2 and rank < min(matrix_shape(param.shape))
    if projected:
        assert rank is not None
        shape = matrix_shape(param.shape)
        subspace = make_subspace(group, rank, shape)
        small_shape = subspace.small_shape(shape)
    return Slot(
        param=param,
        group=group,
        place=place,
        inner=inner,
        subspace=subspace,
        moments_dtype=torch.promote_types(param.dtype, torch.float32),
        small_shape=small_shape,
        small_size=math.prod(small_shape),
        projected=projected,
    )


def check_parameter(name: str, param: Tensor) -> None:
    """Only real floating-point weights can be stepped."""
    if param.is_complex() or not param.is_floating_point():
        raise InputError(
            f"{name} is of {param.dtype}; only real floating-point weights are stepped"
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
            stacklevel=5,
        )
