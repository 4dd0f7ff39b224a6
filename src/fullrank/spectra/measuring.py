"""From a model to the spectra of its matrices: exact or sampled, several at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import nn

from fullrank.core.errors import InputError
from fullrank.core.progress import progress
from fullrank.linalg import gram_spectrum, sampled_spectrum
from fullrank.spectra.matrices import Weight, weight_matrices
from fullrank.spectra.matrix_spectrum import MatrixSpectrum, measures
from fullrank.spectra.parallel import each
from fullrank.spectra.spectrum import Spectrum

PROBES = 8
# 97.5 % quantile of Student's t with PROBES - 1 degrees of freedom.
_STUDENT = 2.365
# Leading values are taken as found once their vectors are within 0.03 of their direction: the
# values are then off by its square.
_LEADING = 1e-3


def measure_all(
    model: nn.Module, include: Sequence[str] | None, sampled: bool, show_progress: bool, seed: int
) -> list[MatrixSpectrum]:
    """Measure every matrix that a pattern of ``include`` matches (None: all), in model order."""
    weights = list(weight_matrices(model))
    if not weights:
        raise InputError(
            f"{type(model).__name__} has no linear layer and no embedding with floating-point "
            "weights: nothing to look at"
        )
    for pattern in include or ():
        if not any(fnmatchcase(w.name, pattern) for w in weights):
            raise InputError(f"no matrix is named like {pattern!r}, e.g. {weights[0].name!r} is")
    if include is not None:
        weights = [w for w in weights if any(fnmatchcase(w.name, p) for p in include)]

    def measure(weight: Weight) -> MatrixSpectrum:
        if sampled and weight.rank is None and sampling_pays(weight.shape):
            return _sampled(weight, seed)
        return _exact(weight)

    found: dict[str, MatrixSpectrum] = {}
    longest_first = sorted(weights, key=lambda w: w.cost, reverse=True)
    with progress("X-ray", len(weights), show_progress, "matrices") as advance:
        for weight, matrix in each(measure, longest_first):
            found[weight.name] = matrix
            advance(1)
    return [found[w.name] for w in weights]


def sampling_pays(shape: tuple[int, int]) -> bool:
    """Whether sampling takes less time than the Gram matrix and its eigenvalues.

    Nanoseconds a row of the long side: what was measured on a core with AVX-512, of which only the
    ratios matter. Sampling is linear in both sides, the Gram matrix quadratic in the short one.

    >>> sampling_pays((768, 3072)), sampling_pays((4096, 4096))
    (False, True)
    """
    short, long = sorted(shape)
    gram = short**2 / 45
    eigenvalues = short**3 / (16 * long)
    return gram + eigenvalues > 60 * short


def _exact(weight: Weight) -> MatrixSpectrum:
    try:
        values = gram_spectrum(weight.fetch()).cpu().numpy()
    except ValueError as error:
        raise InputError(f"{weight.name}: {error}") from error
    if weight.rank is not None:
        # What is beyond the factors' rank is rounding.
        values[weight.rank :] = 0.0
    return MatrixSpectrum(
        weight.name, weight.kind, weight.shape, Spectrum(values), rank=weight.rank
    )


def _sampled(weight: Weight, seed: int) -> MatrixSpectrum:
    try:
        found = sampled_spectrum(weight.fetch(), probes=PROBES, generator=seed)
    except ValueError as error:
        raise InputError(f"{weight.name}: {error}") from error
    spectrum = Spectrum(found.values.cpu().numpy())
    replicates = [measures(Spectrum(row)) for row in found.replicates.cpu().numpy()]
    coarse = measures(Spectrum(found.coarse.cpu().numpy()))
    margins = {
        # Chance, what more Lanczos steps would still change, and the leading values' own error.
        # On steep spectra as much may be ahead as the last doubling of the steps has changed.
        name: _STUDENT * _jackknife([r[name] for r in replicates])
        + 2 * abs(value - coarse[name])
        + _LEADING * value
        for name, value in measures(spectrum).items()
    }
    return MatrixSpectrum(weight.name, weight.kind, weight.shape, spectrum, margins=margins)


def _jackknife(values: Sequence[float]) -> float:
    """Standard error from the values that leaving out one probe at a time gives."""
    spread = np.square(np.asarray(values) - np.mean(values)).sum()
    return math.sqrt((len(values) - 1) / len(values) * float(spread))
