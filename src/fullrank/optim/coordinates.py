"""Subspaces of coordinates: some columns, rows or single entries of a matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Self, get_args

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim.foundation import Spec
from fullrank.optim.subspace import MomentPolicy

Coordinate = Literal["columns", "rows", "randk"]

# What the saved seed says when there is none: not chosen yet, or chosen by a caller.
_NONE, _GIVEN = 0, -1


class Coordinates:
    """A random choice of columns, rows or entries.

    What is saved is the seed of the draw alone, from which the indices are drawn again: those of
    single entries would take more room than the moments they point at.

    Parameters
    ----------
    count
        How many of them.
    side
        ``"columns"``, ``"rows"`` or ``"randk"`` (entries).
    shape
        ``(m, n)`` of the matrix.
    seed
        Of the draw; None before the first.
    indices
        int64; drawn from the seed unless given.

    Examples
    --------
    >>> space = Coordinates(2, "columns", (3, 4), indices=torch.tensor([3, 0]))
    >>> space.down(torch.arange(12.0).view(3, 4))
    tensor([[ 3.,  0.],
            [ 7.,  4.],
            [11.,  8.]])
    """

    draws = True
    entrywise = True

    def __init__(
        self,
        count: int,
        side: Coordinate,
        shape: tuple[int, int],
        seed: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> None:
        if side not in get_args(Coordinate):
            raise InputError(f"coordinates {side!r}; they are one of {get_args(Coordinate)}")
        m, n = shape
        self.total = {"columns": n, "rows": m, "randk": m * n}[side]
        if not 1 <= count <= self.total:
            raise InputError(f"{count} of {self.total} {side}; choose between 1 and all of them")
        self.count = count
        self.side: Coordinate = side
        self.shape = shape
        self._seed = seed
        self._indices = indices

    @property
    def fitted(self) -> bool:
        """Whether there are indices, or a seed to draw them from."""
        seed = _NONE if self._seed is None else int(self._seed)
        return self._indices is not None or seed not in (_NONE, _GIVEN)

    @property
    def state(self) -> dict[str, Tensor]:
        """The seed; -1 where the indices were given, which are then there too."""
        if self._seed is None:
            return {}
        given = {} if self._indices is None else {"indices": self._indices}
        return {"seed": self._seed, **(given if int(self._seed) == _GIVEN else {})}

    def expected(self, shape: tuple[int, int], dtype: torch.dtype) -> Spec:
        """One number; indices that were given come beside it."""
        return {"seed": ((), torch.int64)}

    def small_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """``(m, k)`` for columns, ``(k, n)`` for rows, ``(k,)`` for entries."""
        m, n = shape
        small = {"columns": (m, self.count), "rows": (self.count, n), "randk": (self.count,)}
        return small[self.side]

    def restore(self, state: dict[str, Tensor]) -> Self:
        """Return the choice that a seed stands for, or that was given."""
        seed = state.get("seed")
        given = seed is not None and int(seed) == _GIVEN
        return self._with(seed, state.get("indices") if given else None)

    def _with(self, seed: Tensor | None, indices: Tensor | None = None) -> Self:
        return type(self)(self.count, self.side, self.shape, seed, indices)

    def fit(self, weight: Tensor, grad: Tensor, generator: torch.Generator | None = None) -> Self:
        """Choose anew; of the gradient only the device matters."""
        new = self._with(torch.randint(1, 1 << 62, (), generator=generator))
        new._at(grad)
        return new

    def inject(self, given: Sequence[Tensor], like: Tensor) -> Self:
        """Return the choice of these indices (flat and row-major for entries)."""
        shapes = [tuple(each.shape) for each in given]
        if shapes != [(self.count,)]:
            raise InputError(f"indices of shape {shapes}; {self.side} need [({self.count},)]")
        indices = given[0].detach().to(like.device, torch.int64)
        return self._with(torch.tensor(_GIVEN), indices)

    def _at(self, like: Tensor) -> Tensor:
        if self._indices is None:
            if not self.fitted:
                raise InputError("no coordinates have been chosen: call fit(weight, grad) first")
            generator = torch.Generator().manual_seed(int(self._seed))  # type: ignore[arg-type]
            drawn = torch.randperm(self.total, generator=generator)[: self.count]
            # In their order in the matrix memory is read from one end to the other.
            self._indices = drawn.sort().values.to(like.device)
        return self._indices

    def down(self, grad: Tensor, out: Tensor | None = None) -> Tensor:
        """Gather; zeros while nothing has been chosen."""
        if not self.fitted:
            return grad.new_zeros(self.small_shape(self.shape)) if out is None else out.zero_()
        at = self._at(grad)
        dim, source = (0, grad.reshape(-1)) if self.side == "randk" else (1, grad)
        if self.side == "rows":
            dim = 0
        if out is not None and out.dtype != grad.dtype:
            return out.copy_(source.index_select(dim, at))
        return torch.index_select(source, dim, at, out=out)

    def up(
        self, small: Tensor, out: Tensor | None = None, alpha: float = 1.0, beta: float = 0.0
    ) -> Tensor:
        """Return ``beta * out + alpha * scatter(small)``."""
        if out is None:
            out, beta = small.new_zeros(self.shape), 1.0
        if beta != 1.0:
            out.mul_(beta)
        if not self.fitted:
            return out
        at, small = self._at(out), small.to(out.dtype)
        if alpha != 1.0:
            # Torch's own factor would take it index by index.
            small = small * alpha
        if self.side != "randk":
            return out.index_add_(0 if self.side == "rows" else 1, at, small)
        if not out.is_contiguous():
            return out.index_put_((at // self.shape[1], at % self.shape[1]), small, accumulate=True)
        out.view(-1).index_add_(0, at, small)
        return out

    def residual(self, grad: Tensor, small: Tensor, out: Tensor) -> Tensor:
        """Write the gradient, with zeros where it was chosen."""
        out.copy_(grad)
        if not self.fitted:
            return out
        at = self._at(grad)
        if self.side == "randk":
            out.view(-1).index_fill_(0, at, 0.0)
            return out
        return out.index_fill_(0 if self.side == "rows" else 1, at, 0.0)

    def align(self, old: Self) -> None:
        """Coordinates have no signs."""

    def transport(self, old: Self, moments: Sequence[Tensor], policy: MomentPolicy) -> None:
        """``rotate`` keeps what both choices share, ``reset`` zeroes, ``keep`` leaves as it is."""
        for moment in moments:
            if policy == "reset":
                moment.zero_()
            elif policy == "rotate":
                moment.copy_(self.down(old.up(moment)))


def share(total: int, density: float) -> int:
    """How many of ``total`` a density means; counts are truncated, as in FRUGAL's code.

    >>> share(16, 0.3)
    4
    """
    return math.floor(total * density)
