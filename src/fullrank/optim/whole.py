"""The subspaces that need no choice: the whole space, and nothing of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim.foundation import Spec
from fullrank.optim.subspace import MomentPolicy


class _Fixed:
    """What both share: no state, nothing to fit."""

    side = "none"
    draws = False
    entrywise = True
    fitted = True

    @property
    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def expected(self, shape: tuple[int, int], dtype: torch.dtype) -> Spec:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> Self:
        """Return itself."""
        return self

    def fit(self, weight: Tensor, grad: Tensor, generator: torch.Generator | None = None) -> Self:
        """Return itself."""
        return self

    def transport(self, old: Self, moments: Sequence[Tensor], policy: MomentPolicy) -> None:
        """Do nothing."""

    def align(self, old: Self) -> None:
        """Do nothing."""

    def inject(self, given: Sequence[Tensor], like: Tensor) -> Self:
        """There is nothing to choose."""
        raise InputError("this matrix is not projected; a hook cannot choose its subspace")


class Identity(_Fixed):
    """The whole space: the small array is the gradient itself.

    >>> Identity().down(torch.ones(2, 3)).shape
    torch.Size([2, 3])
    """

    def small_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the matrix."""
        return shape

    def down(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the gradient, or ``out`` filled with it."""
        return grad if out is None else out.copy_(grad)

    def up(
        self, small: Tensor, out: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
    ) -> Tensor:
        """Return ``beta * out + alpha * small``."""
        if out is None:
            return small * alpha
        if beta != 1.0:
            out.mul_(beta)
        return out.add_(small, alpha=alpha)

    def residual(self, grad: Tensor, small: Tensor, out: Tensor) -> Tensor:
        """Write zeros: nothing lies outside."""
        return out.zero_()


class Everything(Identity):
    """The whole space as what was chosen for a while: when that is over, moments start anew."""


class Nothing(_Fixed):
    """No subspace at all: all of the gradient lies outside, and no moments are kept.

    >>> Nothing().down(torch.ones(2, 3)).numel()
    0
    """

    def small_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(0,)``."""
        return (0,)

    def down(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Return an array of no elements."""
        return grad.new_empty(0) if out is None else out

    def up(
        self, small: Tensor, out: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
    ) -> Tensor:
        """Return ``beta * out``: there is nothing to add."""
        if out is None:
            raise InputError("what has no shape needs out=")
        return out if beta == 1.0 else out.mul_(beta)

    def residual(self, grad: Tensor, small: Tensor, out: Tensor) -> Tensor:
        """Write the gradient."""
        return out.copy_(grad)
