"""Whether calibration data says enough about a layer to factorise it by."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from fullrank.compress.calibration import LayerStats
from fullrank.core.errors import InputError

# Fewer samples than this many a dimension leave directions that the data hardly shows.
_SAMPLES_PER_DIMENSION = 10


def nothing_to_go_by(stats: LayerStats, method: str) -> str:
    """Why a data-driven method cannot order a layer's components; empty if it can.

    So it is with a layer whose weight, or whose every successor's, is zero.
    """
    moments = stats.moments
    # Below this the difference of the two moments is rounding.
    if not moments.covariance.trace() > 1e-13 * moments.second_moment.trace():
        return "what flows through the layer never varies on the calibration data"
    if method == "gauss_newton" and stats.reaction is not None:
        gradient = stats.reaction.gradient
        if gradient.count and not gradient.second_moment.trace() > 0:
            return "the model's output does not react to the layer on the calibration data"
    return ""


def leave_dense(reasons: Mapping[str, str], others: bool) -> None:
    """Warn of layers that stay dense, and why; raise where there are no others.

    Raises
    ------
    InputError
        It names a layer and its reason.
    """
    if not reasons:
        return
    name, why = next(iter(reasons.items()))
    if not others:
        raise InputError(f"{name}: {why}")
    warnings.warn(f"{len(reasons)} layers stay dense, e.g. {name}: {why}", stacklevel=3)


def few_samples(layers: Mapping[str, LayerStats]) -> dict[str, tuple[int, int]]:
    """Samples and dimensions of those layers that saw few of the one for the other.

    Not of layers whose output the model makes no use of (a pooler), where gradients tell.
    """
    return {
        name: (stats.count, stats.moments.width)
        for name, stats in layers.items()
        if stats.count < _SAMPLES_PER_DIMENSION * stats.moments.width and not _unused(stats)
    }


def _unused(stats: LayerStats) -> bool:
    return stats.reaction is not None and not stats.reaction.gradient.count


def warn_of_few(few: Mapping[str, tuple[int, int]]) -> None:
    """Warn of what :func:`few_samples` found."""
    if few:
        name, (samples, width) = next(iter(few.items()))
        layers = "1 layer" if len(few) == 1 else f"{len(few)} layers"
        warnings.warn(
            f"{layers} saw few calibration samples, e.g. {name}: {samples} for {width} "
            f"dimensions; at least {_SAMPLES_PER_DIMENSION} a dimension make factors that hold on "
            "other data",
            stacklevel=3,
        )
