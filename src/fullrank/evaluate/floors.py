"""Floors: whether a system keeps a share of another's mean, and which shares can be told."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError
from fullrank.evaluate.bootstrap import (
    Vector,
    expanded_share,
    finite_values,
    grouped,
    resampled_means,
)

Values: TypeAlias = npt.ArrayLike | Mapping[str, float]
Labels: TypeAlias = Sequence[Hashable] | Mapping[str, Hashable]

# A system that is exactly as good as the floor asks must not miss it by rounding.
_ROUNDING = 1e-12


class FloorTest(NamedTuple):
    """The outcome of :func:`floor_test`.

    Attributes
    ----------
    ratio
        Of the means.
    lower
        Lower end of its one-sided interval.
    floor
        As asked for.
    holds
        Whether ``lower`` is at or above ``floor``.
    """

    ratio: float
    lower: float
    floor: float
    holds: bool

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "does not hold"
        return (
            f"keeps {self.ratio:.2%} (lower end {self.lower:.2%}): "
            f"the floor of {self.floor:.2%} {verdict}"
        )


def floor_test(
    values: Values,
    base: Values,
    floor: float,
    *,
    clusters: Labels | None = None,
    confidence: float = 0.95,
    samples: int = 10_000,
    seed: int = 0,
) -> FloorTest:
    """Test whether a system keeps at least the share ``floor`` of another's mean.

    It does when the lower end of a one-sided paired bootstrap interval of the ratio of means is
    at or above the floor (a test of non-inferiority): not being found worse is not enough.
    For an absolute floor let ``base`` be ones.

    Parameters
    ----------
    values, base
        (n,) values of the system and of the one it is held against, for the same queries in the
        same order; or two mappings from query id to value, matched by id.
    floor
        Share of ``base``'s mean, e.g. 0.97.
    clusters
        (n,) labels, or query id -> label: whole clusters are drawn.
    confidence
        Of the one-sided interval.
    samples
        How often to draw.
    seed
        Of the draws.

    Raises
    ------
    InputError
        On lengths or queries that differ, values that are not finite, a mean of ``base`` that is
        not positive, or fewer than two queries or clusters.

    Examples
    --------
    >>> base = [0.5, 0.6, 0.7, 0.4, 0.8, 0.6]
    >>> print(floor_test([0.5, 0.6, 0.69, 0.4, 0.79, 0.6], base, 0.97))
    keeps 99.44% (lower end 98.86%): the floor of 97.00% holds
    """
    if not floor > 0:
        raise InputError(f"the floor is {floor}; a positive share is expected, e.g. 0.97")
    ratio, ratios, cut = _ratios(values, base, clusters, confidence, samples, seed)
    # The sample below, not a value between two: a draw may be minus infinity (see _ratios).
    lower = float(np.quantile(ratios, cut, method="lower"))
    return FloorTest(ratio, lower, floor, lower >= floor * (1 - _ROUNDING))


def smallest_floor(
    values: Values,
    base: Values,
    *,
    clusters: Labels | None = None,
    confidence: float = 0.95,
    power: float = 0.8,
    samples: int = 10_000,
    seed: int = 0,
) -> float:
    """Find the floor nearest to 1 that this many queries can decide.

    Two equally good systems still differ query by query, and the lower end of the ratio's
    interval lies below 1 by what that spread amounts to over n queries. A floor above that
    cannot be shown to hold, however good the system. This is the strictest floor that a system
    with ``values``' spread against ``base``, but ``base``'s mean, passes with probability
    ``power``: with q(s) the s-quantile of the bootstrapped ratio divided by the observed ratio,

    ``q(1 - confidence) + q(1 - power) - 1``,

    the first term being how far its interval reaches below what is observed, the second how far
    what is observed falls below 1 when luck is bad. ``power=0.5`` leaves the second out. The
    loss that can be told, 1 minus the result, halves with four times as many queries.

    Parameters
    ----------
    values, base, clusters, confidence, samples, seed
        As for :func:`floor_test`.
    power
        Probability with which an equally good system passes, in [0.5, 1).

    Returns
    -------
    float
        In [0, 1]; 1 when the two never differ.

    Raises
    ------
    InputError
        As :func:`floor_test`; and when the mean of ``values`` is not positive.

    Examples
    --------
    >>> import numpy as np
    >>> generator = np.random.default_rng(0)
    >>> base = generator.uniform(size=2000)
    >>> values = base + generator.normal(scale=0.1, size=2000)
    >>> few, many = smallest_floor(values[:500], base[:500]), smallest_floor(values, base)
    >>> round(few, 2), round(many, 2)
    (0.98, 0.99)
    """
    if not 0.5 <= power < 1:
        raise InputError(f"the power is {power}; it must lie in [0.5, 1)")
    ratio, ratios, cut = _ratios(values, base, clusters, confidence, samples, seed)
    if not ratio > 0:
        raise InputError(f"the ratio of means is {ratio}; its spread says nothing about equals")
    reach, luck = np.quantile(ratios, [cut, 1 - power], method="lower") / ratio
    # Without bad luck counted, what is observed of an equal is 1 by definition.
    floor = reach if power == 0.5 else reach + luck - 1
    return float(np.clip(floor, 0.0, 1.0))


def _ratios(
    values: Values,
    base: Values,
    clusters: Labels | None,
    confidence: float,
    samples: int,
    seed: int,
) -> tuple[float, Vector, float]:
    """Ratio of means, its bootstrap samples, and the share of them below the lower end."""
    first, second, labels = _paired(values, base, clusters)
    if not second.mean() > 0:
        raise InputError(
            f"the mean held against is {second.mean():g}; a share of it needs a positive one"
        )
    groups = grouped(np.column_stack([first, second]), labels)
    means = resampled_means(groups, samples, seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        # A draw of queries on which the base is worth nothing cannot speak for the system.
        ratios = np.where(means[:, 1] > 0, means[:, 0] / means[:, 1], -np.inf)
    cut = expanded_share(1 - confidence, len(groups.sizes))
    return float(first.mean() / second.mean()), ratios, cut


def _paired(
    values: Values, base: Values, clusters: Labels | None
) -> tuple[Vector, Vector, Sequence[Hashable] | None]:
    """Both sets of values in one order of queries, and a label for each."""
    labels: Sequence[Hashable] | None
    if isinstance(values, Mapping) and isinstance(base, Mapping):
        if values.keys() != base.keys():
            odd = min(values.keys() ^ base.keys(), key=str)
            raise InputError(f"values and base are not of the same queries: {odd!r} is in one only")
        labels = labels_of(list(values), clusters)
        first = finite_values(list(values.values()), "the values")
        second = finite_values([base[query] for query in values], "the base's values")
        return first, second, labels
    if isinstance(values, Mapping) or isinstance(base, Mapping):
        raise InputError("values and base must both be mappings by query id, or both sequences")
    if isinstance(clusters, Mapping):
        raise InputError("clusters by query id need values by query id; give one label a value")
    labels = clusters
    first, second = finite_values(values, "the values"), finite_values(base, "the base's values")
    if len(first) != len(second):
        raise InputError(f"{len(first)} values against {len(second)}; they must be of one length")
    return first, second, labels


def labels_of(queries: Sequence[str], clusters: Labels | None) -> Sequence[Hashable] | None:
    """One cluster label a query; no label at all (an empty mapping) means no clusters.

    Raises
    ------
    InputError
        When a query has no label.
    """
    if not isinstance(clusters, Mapping):
        return clusters
    if not clusters:
        return None
    without = [q for q in queries if q not in clusters]
    if without:
        raise InputError(
            f"{len(without)} of {len(queries)} queries have no cluster, e.g. {without[0]!r}"
        )
    return [clusters[q] for q in queries]
