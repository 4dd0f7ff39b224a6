"""How heavy the tail of a weight's spectrum is: the exponent of the power law that fits it best.

Martin and Mahoney, "Implicit self-regularization in deep neural networks", 2021, arXiv 1810.01075:
eigenvalues of ``W^T W`` of well-trained layers follow ``p(lambda) ~ lambda^-alpha`` from some value
on, with alpha from 2 to 4 as a rule; a layer that learnt little has a larger one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fullrank.core.errors import InputError
from fullrank.spectra.values import Input, singular_values

_LEAST = 5
"""Eigenvalues of a tail, at least: fewer fit anything."""

# Logarithms of eigenvalues that differ by less do so in rounding, of float32 perhaps.
_SAME = 1e-5


@dataclass(frozen=True)
class TailFit:
    """A power law over the largest eigenvalues.

    Attributes
    ----------
    alpha
        Exponent of the density.
    start
        The smallest eigenvalue of the tail.
    count
        Eigenvalues in it.
    distance
        Kolmogorov and Smirnov's, of the tail from the law: small for a good fit.
    """

    alpha: float
    start: float
    count: int
    distance: float

    @property
    def error(self) -> float:
        """Standard error of alpha, as far as the law holds."""
        return (self.alpha - 1) / math.sqrt(self.count)


def heavy_tail_alpha(x: Any, *, input: Input = "matrix") -> TailFit:
    """Fit a power law to the tail of the squared singular values (Clauset et al. 2009).

    Alpha is the maximum-likelihood exponent; where the tail starts is chosen so that the law is
    nearest to what is there.

    Parameters
    ----------
    x
        ``(N, K)`` matrix, or singular values in any order.
    input
        ``"matrix"`` or ``"singular_values"``.

    Raises
    ------
    InputError
        On fewer than five different eigenvalues above zero, and on bad input as for
        :func:`~fullrank.spectra.effective_rank`.

    Examples
    --------
    >>> uniform = (np.arange(2000) + 0.5) / 2000
    >>> pareto = uniform ** (-1 / 1.5)                  # density exponent 2.5
    >>> fit = heavy_tail_alpha(np.sqrt(pareto), input="singular_values")
    >>> round(fit.alpha, 1), fit.distance < 0.01
    (2.5, True)
    """
    values = singular_values(x, input).cpu().numpy()
    if values.ndim != 1:
        raise InputError(f"singular values of shape {values.shape}; one matrix at a time is fitted")
    largest = float(values.max())
    # Below this, squares of rounding.
    logs = np.sort(2 * np.log(values[values > 1e-8 * largest] / (largest or 1.0)))[::-1]
    different = len(np.unique(np.round(logs / _SAME)))
    if different < _LEAST:
        raise InputError(
            f"{different} different eigenvalues above zero; at least {_LEAST} make a tail"
        )
    counts = np.arange(1, len(logs) + 1)
    excess = np.cumsum(logs) - counts * logs
    best: TailFit | None = None
    for count in range(_LEAST, len(logs) + 1):
        if not excess[count - 1] > 0:
            continue
        rate = count / excess[count - 1]  # alpha - 1
        above = np.exp(-rate * (logs[:count] - logs[count - 1]))
        # The law's share above each eigenvalue against the sample's, just before and after it.
        steps = counts[:count] / count
        distance = max(np.abs(above - steps).max(), np.abs(above - (steps - 1 / count)).max())
        if best is None or distance < best.distance:
            start = float(np.exp(logs[count - 1]) * largest**2)
            best = TailFit(1 + float(rate), start, count, float(distance))
    assert best is not None
    return best
