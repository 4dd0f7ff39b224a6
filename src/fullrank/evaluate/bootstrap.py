"""Bootstrap intervals of means, drawing queries or whole clusters of them."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError

Vector: TypeAlias = npt.NDArray[np.float64]
Matrix: TypeAlias = npt.NDArray[np.float64]

# Numbers drawn at a time: a few temporaries of 8 MB, whatever the number of samples.
_DRAWN_AT_ONCE = 1 << 20


class Interval(NamedTuple):
    """A mean and the interval around it."""

    mean: float
    lower: float
    upper: float

    def __str__(self) -> str:
        return f"{self.mean:+.4f} [{self.lower:+.4f}, {self.upper:+.4f}]"


class Groups(NamedTuple):
    """What is drawn as one: sums (G, K) over the queries of each cluster, and their number (G,)."""

    sums: Matrix
    sizes: Vector


def grouped(columns: Matrix, clusters: Sequence[Hashable] | None) -> Groups:
    """Add up the (n, K) values of each cluster; without clusters every query is its own.

    Raises
    ------
    InputError
        When there are not as many labels as queries.
    """
    if clusters is None:
        return Groups(columns, np.ones(len(columns)))
    if len(clusters) != len(columns):
        raise InputError(f"{len(clusters)} clusters for {len(columns)} queries: one label a query")
    numbers: dict[Hashable, int] = {}
    codes = np.array([numbers.setdefault(label, len(numbers)) for label in clusters])
    sums = np.zeros((len(numbers), columns.shape[1]))
    np.add.at(sums, codes, columns)
    return Groups(sums, np.bincount(codes).astype(np.float64))


def resampled_means(groups: Groups, samples: int, seed: int) -> Matrix:
    """(samples, K) means of the columns over groups drawn with replacement, as many as there are.

    All columns see the same draws, so that what is computed from several of them is paired.
    """
    if samples < 1:
        raise InputError(f"{samples} samples; at least 1 is needed, 10,000 is usual")
    count = len(groups.sizes)
    if count < 2:
        raise InputError(
            f"there is only {count} query or cluster of queries: nothing says how much another "
            "would differ; an interval needs at least 2, and is worth little below 10"
        )
    generator = np.random.default_rng(seed)
    totals = np.column_stack([groups.sums, groups.sizes])
    means = np.empty((samples, groups.sums.shape[1]))
    step = max(1, _DRAWN_AT_ONCE // count)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = generator.integers(0, count, size=(rows, count))
        drawn += np.arange(0, rows * count, count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
        sums = times.astype(np.float64) @ totals
        means[start : start + rows] = sums[:, :-1] / sums[:, -1:]
    return means


def student_quantile(share: float, freedom: int) -> float:
    """Quantile of Student's t distribution for ``0.5 <= share < 1``.

    >>> round(student_quantile(0.975, 9), 4), round(student_quantile(0.95, 1), 4)
    (2.2622, 6.3138)
    """
    nodes, weights = np.polynomial.legendre.leggauss(64)
    log_norm = math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2) + math.log(math.pi) / 2

    def below(t: float) -> float:
        # With t = sqrt(f) tan(angle) the density becomes a power of the cosine.
        angles = math.atan(t / math.sqrt(freedom)) / 2 * (nodes + 1)
        inside = weights @ np.exp((freedom - 1) * np.log(np.cos(angles)) - log_norm)
        return 0.5 + float(inside) * math.atan(t / math.sqrt(freedom)) / 2

    low, high = 0.0, 1.0
    while below(high) < share:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return (low + high) / 2


def expanded_share(tail: float, groups: int) -> float:
    """Share of bootstrap samples to cut off so that the interval leaves out ``tail``.

    Percentiles of the bootstrap are too narrow for few groups: the spread of n things around
    their own mean lacks the factor ``sqrt(n / (n - 1))``, and the normal tails are lighter than
    Student's. Cutting at ``Phi(-sqrt(n / (n - 1)) t)`` makes up for both (Hesterberg 2015, the
    expanded percentile interval): of 10 normal values a 95 % interval then covers the mean in
    95 % of cases, with plain percentiles in 90 %. With many groups it is ``tail`` itself.

    >>> round(expanded_share(0.025, 10), 4), round(expanded_share(0.025, 2000), 4)
    (0.0086, 0.0249)
    """
    if not 0 < tail < 0.5:
        raise InputError(f"the confidence leaves {tail:g} in a tail; it must lie in (0, 0.5)")
    reach = math.sqrt(groups / (groups - 1)) * student_quantile(1 - tail, groups - 1)
    return NormalDist().cdf(-reach)


def column_intervals(
    columns: Matrix,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> list[Interval]:
    """:func:`bootstrap_interval` for each column of (n, K) values, from the same draws."""
    groups = grouped(columns, clusters)
    intervals: list[Interval] = []
    # In blocks: (samples, K) means of many columns would fill the memory.
    for start in range(0, columns.shape[1], 64):
        block = Groups(groups.sums[:, start : start + 64], groups.sizes)
        means = resampled_means(block, samples, seed)
        cut = expanded_share((1 - confidence) / 2, len(groups.sizes))
        lower, upper = np.quantile(means, [cut, 1 - cut], axis=0)
        centre = block.sums.sum(axis=0) / groups.sizes.sum()
        intervals += map(Interval, centre.tolist(), lower.tolist(), upper.tolist())
    return intervals


def finite_values(values: npt.ArrayLike, what: str) -> Vector:
    """(n,) finite float64 values, or an error that names what they are."""
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1 or vector.size == 0:
        raise InputError(f"{what} have shape {vector.shape}; one value a query is expected")
    if not np.isfinite(vector).all():
        at = int(np.flatnonzero(~np.isfinite(vector))[0])
        raise InputError(f"{what} hold {vector[at]} at position {at}; finite numbers are expected")
    return vector


def bootstrap_interval(
    differences: npt.ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Two-sided bootstrap interval of a mean, e.g. of differences between two systems.

    Percentiles of the mean over queries drawn with replacement, widened for small numbers (see
    :func:`expanded_share`). Queries that have something in common (a module, a topic) are not
    independent: with ``clusters`` whole clusters are drawn.

    Parameters
    ----------
    differences
        (n,) values, one a query.
    clusters
        (n,) labels, or None.
    confidence
        Of the interval.
    samples
        How often to draw.
    seed
        Of the draws.

    Raises
    ------
    InputError
        On fewer than two queries or clusters, values that are not finite, lengths that differ.

    Examples
    --------
    >>> low = bootstrap_interval([0.1, 0.3, 0.2, 0.0, 0.4, 0.2]).lower
    >>> 0.0 < low < 0.1
    True
    """
    columns = finite_values(differences, "the differences")[:, None]
    return column_intervals(columns, clusters, confidence, samples, seed)[0]
