"""Building, recovering and measuring plans of a family, and the smallest that holds a floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from fullrank.compress.curve import Candidate, FloorError, FloorTest, PointTest, Shrunk
from fullrank.compress.family import Family
from fullrank.compress.search_record import Measured, SearchRecord
from fullrank.core.errors import InputError

Metric = Callable[[Any], "npt.ArrayLike | float"]
Recover = Callable[[nn.Module], None]
Values = npt.NDArray[np.float64]


@dataclass
class Search:
    """Measures candidates and remembers them, on disk too where there is a record.

    Attributes
    ----------
    curve
        What was measured, in this order.
    chosen
        Share asked for, figures and test of the smallest that holds, and the model itself unless
        it comes from an earlier run.
    """

    family: Family
    metric: Metric
    reference: Values
    floor: float
    relative: bool
    lower_is_better: bool
    clusters: Sequence[Any] | None
    confidence: float
    recover: Recover | Literal[False]
    record: SearchRecord | None = None
    curve: list[Candidate] = field(default_factory=list)
    chosen: tuple[float, Candidate, FloorTest, nn.Module | None] | None = None

    def measure(self, share: float) -> Candidate:
        """Measure the plan of a share, or look up what was measured."""
        found = None if self.record is None else self.record.get(share)
        model = None
        if found is None:
            found, model = self._made(share)
        test = self._test(found.values)
        savings = found.plan.savings()
        candidate = Candidate(
            found.plan,
            savings.kept,
            savings.planned,
            found.parameters,
            float(found.values.mean()),
            float(test.ratio),
            float(test.lower),
            bool(test.holds),
            found.seconds,
        )
        self.curve.append(candidate)
        if candidate.holds and (self.chosen is None or candidate.kept < self.chosen[1].kept):
            self.chosen = share, candidate, test, model
            if self.record is not None and model is not None:
                self.record.keep(share, model)
        # Weights first: a value on disk says that its weights were kept, if they were to be.
        if self.record is not None and model is not None:
            self.record.add(share, found)
        return candidate

    def _made(self, share: float) -> tuple[Measured, nn.Module]:
        began = time.monotonic()
        plan = self.family.plan(share)
        model = self._built(plan)
        values = measured(self.metric, model, self.reference, self.clusters)
        parameters = sum(p.numel() for p in model.parameters())
        return Measured(plan, values, parameters, time.monotonic() - began), model

    def _built(self, plan: Any) -> nn.Module:
        model = self.family.build(plan)
        if self.recover:
            self.recover(model)
        return model

    def _test(self, values: Values) -> FloorTest:
        # An absolute floor is a share of one.
        base = self.reference if self.relative else np.ones_like(values)
        floor = self.floor
        if self.lower_is_better:
            # At most c times the base is at least 1 / c of it, turned round.
            values, base, floor = base, values, 1 / floor
        if len(values) == 1:
            ratio = float(values[0] / base[0])
            return PointTest(ratio, ratio, ratio >= floor)
        from fullrank.evaluate import floor_test

        test: FloorTest = floor_test(
            values, base, floor, clusters=self.clusters, confidence=self.confidence
        )
        return test

    def result(self) -> Shrunk:
        """Return the smallest that holds, or raise with the best there was."""
        curve = tuple(sorted(self.curve, key=lambda c: c.kept))
        if self.chosen is None:
            raise self._failure(curve)
        share, candidate, test, model = self.chosen
        if model is None:
            model = self._again(share, candidate)
        return Shrunk(
            model,
            candidate.plan,
            curve,
            test,
            self.floor,
            self.relative,
            float(self.reference.mean()),
        )

    def _again(self, share: float, candidate: Candidate) -> nn.Module:
        """Return the model of an earlier run: its weights, or made again where they are gone."""
        model = self.family.build(candidate.plan)
        if self.record is None or not self.record.restore(share, model):
            model = self._built(candidate.plan)
        return model

    def _failure(self, curve: tuple[Candidate, ...]) -> FloorError:
        best = max(curve, key=lambda c: c.lower, default=None)
        found = ""
        if best is not None:
            found = (
                f"; the best of {len(curve)} keeps {best.kept:.0%} of the linear parameters and "
                f"reaches {best.ratio:.4f} (lower end {best.lower:.4f})"
            )
            if self.lower_is_better:
                found = (
                    f"; the best of {len(curve)} keeps {best.kept:.0%} of the linear parameters at "
                    f"{best.value:.4f}, {1 / best.ratio:.4f} of what it is held against (upper end "
                    f"{1 / best.lower:.4f})"
                )
        bound = "ceiling" if self.lower_is_better else "floor"
        easier = "Raise the ceiling" if self.lower_is_better else "Lower the floor"
        return FloorError(
            f"no plan measured holds the {bound} of {self.floor:g}{found}. {easier}, "
            "allow more candidates or recovery, or measure on more queries",
            best,
            curve,
        )


def order(
    search: Search,
    candidates: Sequence[float] | None,
    start: float,
    lowest: float,
    resolution: float,
    max_candidates: int,
) -> Iterable[float]:
    """Shares to measure next, in the light of what was measured."""
    if candidates is not None:
        yield from sorted(candidates, reverse=True)
        return
    low, high = min(max(lowest, search.family.smallest), 1.0), 1.0
    keep = max(start, low)
    for _ in range(max_candidates):
        yield keep
        if search.curve[-1].holds:
            high = keep
        else:
            low = keep
        if high - low <= resolution:
            return
        keep = (low + high) / 2


def measured(
    metric: Metric,
    model: nn.Module,
    reference: Values | None,
    clusters: Sequence[Any] | None,
) -> Values:
    """Call a metric and check what it gave."""
    given = metric(model)
    try:
        values = np.atleast_1d(np.asarray(given, dtype=np.float64))
    except (TypeError, ValueError):
        raise InputError(
            f"the metric gave a {type(given).__name__}; one number a query, or one, is expected"
        ) from None
    if values.ndim != 1 or values.size == 0:
        raise InputError(f"the metric gave shape {values.shape}; one number a query is expected")
    if not np.isfinite(values).all():
        raise InputError("the metric gave NaN or infinite values")
    if reference is not None and len(values) != len(reference):
        raise InputError(
            f"the metric gave {len(values)} values, and {len(reference)} for the original"
        )
    if clusters is not None and len(values) > 1 and len(clusters) != len(values):
        raise InputError(f"{len(clusters)} clusters for {len(values)} queries")
    return values
