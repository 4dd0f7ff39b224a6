"""Paired randomisation test, and what many tests at once call for."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError
from fullrank.evaluate.bootstrap import Matrix, Vector, finite_values, grouped

# Signs drawn at a time: temporaries of 8 MB.
_SIGNS_AT_ONCE = 1 << 20
# Sums that are equal on paper differ by rounding; they count as equal.
_ROUNDING = 1e-10


def randomisation_test(
    a: npt.ArrayLike,
    b: npt.ArrayLike,
    *,
    clusters: Sequence[Hashable] | None = None,
    permutations: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of a paired randomisation test of the difference of means.

    Were both systems alike, swapping their values for a query would change nothing: p is the
    share of swaps under which the means differ by at least as much as they do. All swaps are
    tried when there are at most ``permutations`` distinct ones (the value is then exact),
    otherwise that many at random, and p is ``(1 + count) / (1 + permutations)``.

    Parameters
    ----------
    a, b
        (n,) values of two systems for the same queries.
    clusters
        (n,) labels: queries of one cluster are swapped together, since they are not independent.
    permutations
        How many swaps to try.
    seed
        Of the swaps.

    Raises
    ------
    InputError
        On lengths that differ, or values that are not finite.

    Examples
    --------
    >>> randomisation_test([0.9, 0.8, 0.7], [0.1, 0.2, 0.1])
    0.25
    """
    first, second = finite_values(a, "the first values"), finite_values(b, "the second values")
    if len(first) != len(second):
        raise InputError(f"{len(first)} values against {len(second)}; they must be of one length")
    return column_p_values((first - second)[:, None], clusters, permutations, seed)[0]


def column_p_values(
    differences: Matrix,
    clusters: Sequence[Hashable] | None = None,
    permutations: int = 10_000,
    seed: int = 0,
) -> list[float]:
    """P-value for each column of (n, K) differences, from the same swaps."""
    if permutations < 1:
        raise InputError(f"{permutations} permutations; at least 1 is needed, 10,000 is usual")
    sums = grouped(differences, clusters).sums
    p_values: list[float | None] = [None] * sums.shape[1]
    sampled = []
    for column in range(sums.shape[1]):
        # What is zero stays zero under any sign.
        moved = sums[sums[:, column] != 0, column]
        # A pattern of signs and its opposite are equally far out, so half of them will do.
        if len(moved) == 0 or 2 ** (len(moved) - 1) <= permutations:
            p_values[column] = _exact(moved)
        else:
            sampled.append(column)
    for start in range(0, len(sampled), 64):
        block = sampled[start : start + 64]
        for column, p in zip(block, _sampled(sums[:, block], permutations, seed), strict=True):
            p_values[column] = p
    return [p for p in p_values if p is not None]


def _exact(values: Vector) -> float:
    if len(values) == 0:
        return 1.0
    patterns = np.arange(2 ** (len(values) - 1))[:, None]
    # The last value is never flipped.
    flipped = (patterns >> np.arange(len(values))) & 1
    sums = values.sum() - 2 * (flipped @ values)
    return float(np.mean(np.abs(sums) >= _bar(values[:, None])))


def _sampled(values: Matrix, permutations: int, seed: int) -> list[float]:
    generator = np.random.default_rng(seed)
    count, bar, observed = len(values), _bar(values), values.sum(axis=0)
    width = -(-count // 64)
    step = max(1, _SIGNS_AT_ONCE // (64 * width))
    reached = np.zeros(values.shape[1], dtype=np.int64)
    for start in range(0, permutations, step):
        rows = min(step, permutations - start)
        drawn = generator.integers(0, 2**64, size=(rows, width), dtype=np.uint64)
        flipped = np.unpackbits(drawn.view(np.uint8), axis=1, count=count).astype(np.float64)
        reached += (np.abs(observed - 2 * (flipped @ values)) >= bar).sum(axis=0)
    return ((1 + reached) / (1 + permutations)).tolist()  # type: ignore[no-any-return]


def _bar(values: Matrix) -> Vector:
    """(K,) sums that count as at least as large as the one observed."""
    bar: Vector = np.abs(values.sum(axis=0)) - _ROUNDING * np.abs(values).sum(axis=0)
    return bar


def holm(p_values: Iterable[float]) -> list[float]:
    """Holm's step-down correction: p-values that hold for all the tests together.

    The smallest of m p-values is multiplied by m, the next by m - 1, and so on; none may then
    be below one before it, or above 1.

    Raises
    ------
    InputError
        On a value outside [0, 1].

    Examples
    --------
    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03, 0.005])]
    [0.03, 0.06, 0.06, 0.02]
    """
    values = np.array(list(p_values), dtype=np.float64)
    if not ((values >= 0) & (values <= 1)).all():
        raise InputError(f"p-values lie in [0, 1]; these are {values.tolist()}")
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return corrected.tolist()  # type: ignore[no-any-return]
