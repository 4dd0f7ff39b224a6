"""Rank rules that cut a spectrum at a height: WeLore's and Maestro's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError
from fullrank.core.rank_rules import LayerSpectrum

Vector = npt.NDArray[np.float64]


def normalised(seen: LayerSpectrum) -> Vector | None:
    """Singular values mapped to [0, 1] by the layer's own extremes; None where all are equal."""
    values = np.asarray(seen.values, dtype=np.float64)
    low, high = values.min(), values.max()
    # Values that differ by rounding alone, as those of an orthogonal matrix do, say nothing: that
    # of the numbers the weight is kept in, and of the float32 in which it was once computed, which
    # adds up over its rows.
    rounding = 2 * (seen.eps + math.sqrt(max(seen.shape)) * 2.0**-23)
    if not high - low > rounding * high:
        return None
    scaled: Vector = (values - low) / (high - low)
    return scaled


@dataclass(frozen=True)
class NormalisedThreshold:
    """Keep the singular values of at least ``theta`` on the layer's own scale from 0 to 1.

    ``z_i = (s_i - min s) / (max s - min s)``; components with ``z_i < theta`` are dropped, so
    that layers with a heavy tail lose many and flat ones few (WeLore, section 3). A layer whose
    singular values are all equal stays dense.

    Parameters
    ----------
    theta
        In [0, 1]; the smallest value has z = 0, the largest z = 1 and is always kept.

    Examples
    --------
    >>> NormalisedThreshold(0.2)(np.array([10.0, 4.0, 2.0, 1.0]), 4, 6)
    2
    """

    theta: float

    def __post_init__(self) -> None:
        if not 0 <= self.theta <= 1:
            raise InputError(f"theta is {self.theta}; it must lie in [0, 1]")

    def __call__(self, spectrum: Vector, m: int, n: int) -> int | None:
        """Rank of an (m, n) layer."""
        return self._rank(LayerSpectrum(spectrum, (m, n)))

    def ranks(self, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int | None]:
        """Rank of every layer, with an eye on the numbers its weight is kept in."""
        return {name: self._rank(seen) for name, seen in spectra.items()}

    def _rank(self, seen: LayerSpectrum) -> int | None:
        z = normalised(seen)
        return None if z is None else int(np.count_nonzero(z >= self.theta))


def effective_reduction(spectra: Mapping[str, LayerSpectrum], theta: float) -> float:
    """Share of all layers' directions that :class:`NormalisedThreshold` drops at ``theta``.

    >>> layer = LayerSpectrum(np.array([10.0, 4.0, 2.0, 1.0]), (4, 6))
    >>> effective_reduction({"a": layer, "b": layer}, 0.2)
    0.5
    """
    ranks = NormalisedThreshold(theta).ranks(spectra)
    full = dropped = 0
    for name, seen in spectra.items():
        k, rank = seen.stack * len(seen.values), ranks[name]
        full += k
        dropped += 0 if rank is None else k - seen.stack * rank
    return dropped / full if full else 0.0


def solve_for_reduction(spectra: Mapping[str, LayerSpectrum], target: float) -> float:
    """Find the smallest theta that drops at least the share ``target`` of all directions.

    The share is a step function of theta that rises just above each normalised singular value,
    so the answer is the number next to one of them.

    Parameters
    ----------
    spectra
        Of all layers; see :func:`~fullrank.compress.layer_spectra`.
    target
        Effective rank reduction in [0, 1). 0 gives theta 0, which drops nothing.

    Raises
    ------
    InputError
        On a target outside [0, 1), or one that no theta reaches: each layer keeps its strongest
        direction.

    Examples
    --------
    >>> layer = LayerSpectrum(np.array([10.0, 4.0, 2.0, 1.0]), (4, 6))
    >>> theta = solve_for_reduction({"a": layer}, 0.5)
    >>> NormalisedThreshold(theta)(layer.values, 4, 6), theta - (2.0 - 1.0) / 9.0 < 1e-12
    (2, True)
    """
    if not 0 <= target < 1:
        raise InputError(f"the target reduction is {target}; it must lie in [0, 1)")
    if target == 0:
        return 0.0
    scaled = [(normalised(s), s.stack) for s in spectra.values()]
    z = np.concatenate([v for v, _ in scaled if v is not None] or [np.zeros(0)])
    weights = np.concatenate(
        [np.full(len(v), float(stack)) for v, stack in scaled if v is not None] or [np.zeros(0)]
    )
    full = sum(s.stack * len(s.values) for s in spectra.values())
    # A value of 1 is never below a theta of at most 1.
    below = z < 1
    z, weights = z[below], weights[below]
    order = np.argsort(z)
    reached = np.cumsum(weights[order]) / max(full, 1)
    index = int(np.searchsorted(reached, target - 1e-12))
    if index == len(reached):
        most = reached[-1] if len(reached) else 0.0
        raise InputError(f"these layers can drop {most:.1%} of their directions, not {target:.1%}")
    return float(np.nextafter(z[order][index], np.inf))


@dataclass(frozen=True)
class ImportanceThreshold:
    """As many components as have an importance of at least ``eps`` in the spectrum's tail.

    The importance of component i of factors ``B A`` is the product of the norms of the tails
    ``B[:, i:]`` and ``A[i:]``. With singular values shared equally between the factors, as Maestro
    starts, that is ``sum(s[i:])`` (Maestro, section 3).

    Parameters
    ----------
    eps
        1e-5 in the official code.

    Examples
    --------
    >>> ImportanceThreshold(0.5)(np.array([2.0, 0.4, 0.2, 0.1]), 4, 6)
    2
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        if not 0 <= self.eps < np.inf:
            raise InputError(f"eps is {self.eps}; it must not be negative")

    def __call__(self, spectrum: Vector, m: int, n: int) -> int | None:
        """Rank of an (m, n) layer; None where nothing is that important."""
        tails = np.cumsum(np.asarray(spectrum, dtype=np.float64)[::-1])[::-1]
        return int(np.count_nonzero(tails >= self.eps)) or None
