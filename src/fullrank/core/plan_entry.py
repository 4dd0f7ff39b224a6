"""`PlanEntry`: what one weight matrix gets, and what that costs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from operator import index
from typing import Any, Literal

from fullrank.core.errors import PlanError

Purpose = Literal["factor", "optimizer", "adapter"]


def break_even(m: int, n: int) -> int:
    """Largest rank at which two factors hold fewer numbers than the (m, n) matrix; 0 if none.

    ``r (m + n) < m n``, strictly.

    >>> break_even(384, 1536), break_even(384, 384), break_even(1, 5)
    (307, 191, 0)
    """
    return (m * n - 1) // (m + n)


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """What one weight matrix gets.

    Parameters
    ----------
    shape
        ``(out, in)`` of the weight; of a stack of matrices, one above the other.
    rank
        Rank in ``[1, min(matrix_shape)]``, or None to leave the matrix alone.
    method
        How factors or bases are made, e.g. ``"svd"`` or ``"output_pca"``.
    scheme
        How the weight is read as a matrix: ``"linear"``, or a convolution's scheme.
    reason
        Why this rank, in words a person reads.
    options
        What is not one integer a matrix (JSON values only). ``"stack"``: the weight is so many
        matrices of one shape, each of that rank (a convolution's groups or filters).

    Examples
    --------
    >>> groups = PlanEntry((64, 144), 8, scheme="channel", options={"stack": 4})
    >>> groups.matrix_shape, groups.size("factor"), 4 * 8 * (16 + 144)
    ((16, 144), 5120, 5120)
    """

    shape: tuple[int, int]
    rank: int | None
    method: str = "svd"
    scheme: str = "linear"
    reason: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # NumPy's integers are welcome, and become what JSON can hold.
        try:
            m, n = (_integer(size) for size in self.shape)
            rank = None if self.rank is None else _integer(self.rank)
        except (TypeError, ValueError):
            raise PlanError(
                f"shape {self.shape!r} and rank {self.rank!r}; (out, in) and an integer or None "
                "are expected"
            ) from None
        object.__setattr__(self, "shape", (m, n))
        object.__setattr__(self, "rank", rank)
        try:
            options = json.loads(json.dumps(dict(self.options), default=_number))
        except (TypeError, ValueError) as error:
            raise PlanError(f"options {self.options!r} are no JSON values ({error})") from None
        object.__setattr__(self, "options", options)
        if m < 1 or n < 1:
            raise PlanError(f"shape {self.shape} is not that of a matrix")
        stack = self.stack
        if type(stack) is not int or stack < 1 or m % stack:
            raise PlanError(f"a weight of {m} x {n} is no stack of {stack!r} matrices")
        m = m // stack
        if self.rank is not None and not 1 <= self.rank <= min(m, n):
            raise PlanError(
                f"rank {self.rank} for a {m} x {n} matrix; it must lie in [1, {min(m, n)}]"
            )

    @property
    def stack(self) -> int:
        """Number of matrices that the weight is read as."""
        count: int = self.options.get("stack", 1)
        return count

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """``(out, in)`` of each matrix."""
        return self.shape[0] // self.stack, self.shape[1]

    @property
    def break_even(self) -> int:
        """Largest rank at which factors are smaller than the weight; 0 if none is."""
        return break_even(*self.matrix_shape)

    @property
    def dense_size(self) -> int:
        """Numbers in the full matrix."""
        return self.shape[0] * self.shape[1]

    def size(self, purpose: Purpose) -> int:
        """Numbers this matrix costs under the plan (see :meth:`RankPlan.savings`)."""
        m, n = self.shape
        if purpose == "optimizer":
            if self.rank is None:
                return 2 * m * n
            return 2 * self.rank * max(m, n) + self.rank * min(m, n)
        if self.rank is None:
            return m * n if purpose == "factor" else 0
        return self.stack * self.rank * sum(self.matrix_shape)


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{value} is no integer")
    return index(value)


def _number(value: Any) -> Any:
    if getattr(value, "ndim", None) != 0:
        raise TypeError(f"a {type(value).__name__} is none")
    return value.item()
