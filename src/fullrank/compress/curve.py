"""What a search for the smallest plan measured, and what it found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from fullrank.core.errors import FullrankError
from fullrank.core.plan import RankPlan
from fullrank.core.table import Table


class FloorTest(Protocol):
    """Whether a floor holds; see :func:`fullrank.evaluate.floor_test`."""

    @property
    def ratio(self) -> float:
        """Of the means."""

    @property
    def lower(self) -> float:
        """Lower end of its interval."""

    @property
    def holds(self) -> bool:
        """Whether the lower end is at or above the floor."""


@dataclass(frozen=True)
class PointTest:
    """A floor on a metric that is one number: there is no interval, the ratio itself decides."""

    ratio: float
    lower: float
    holds: bool


@dataclass(frozen=True)
class Candidate:
    """One plan that was built, recovered and measured.

    Attributes
    ----------
    kept
        Share of the factorisable layers' parameters that is left.
    linear_parameters, parameters
        Numbers in those layers, and in the whole model.
    value
        Mean of the metric.
    ratio, lower
        To the original's mean (for an absolute floor: the mean itself), and the lower end of its
        interval.
    holds
        Whether the floor does.
    seconds
        It took to build, recover and measure.
    """

    plan: RankPlan
    kept: float
    linear_parameters: int
    parameters: int
    value: float
    ratio: float
    lower: float
    holds: bool
    seconds: float


class FloorError(FullrankError):
    """No measured plan holds the floor.

    Attributes
    ----------
    best
        The measured candidate that came closest, or None.
    curve
        All of them.
    """

    def __init__(self, message: str, best: Candidate | None, curve: tuple[Candidate, ...]) -> None:
        super().__init__(message)
        self.best = best
        self.curve = curve


@dataclass(frozen=True)
class Shrunk:
    """What :func:`shrink` found.

    Attributes
    ----------
    model
        The smallest model that holds the floor; the original is unchanged.
    plan
        Its plan.
    curve
        Every candidate measured, from small to large.
    floor_test
        The test of the chosen one, on the data the metric used.
    floor, relative
        As asked for.
    reference
        The original's mean.
    """

    model: nn.Module
    plan: RankPlan
    curve: tuple[Candidate, ...]
    floor_test: FloorTest
    floor: float
    relative: bool
    reference: float

    def table(self) -> Table:
        """Return the measured curve."""
        return curve_table(self.curve)


def curve_table(curve: Sequence[Candidate]) -> Table:
    """Size against quality, as measured."""
    return Table(
        ["kept", "linear parameters", "parameters", "value", "ratio", "lower", "holds", "seconds"],
        [
            [
                c.kept,
                c.linear_parameters,
                c.parameters,
                c.value,
                c.ratio,
                c.lower,
                "yes" if c.holds else "no",
                c.seconds,
            ]
            for c in curve
        ],
        title="Size and quality",
        formats={
            "kept": ".1%",
            "linear parameters": ",d",
            "parameters": ",d",
            "value": ".4f",
            "ratio": ".4f",
            "lower": ".4f",
            "seconds": ".1f",
        },
    )
