"""`shrink`: the smallest plan that keeps a metric at or above a floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn

from fullrank.compress.batches import Batches
from fullrank.compress.calibration import CalibrationStats
from fullrank.compress.curve import Candidate, FloorError, FloorTest, PointTest, Shrunk
from fullrank.compress.distill import Distillation
from fullrank.compress.family import Allocation, PlanFamily
from fullrank.compress.solvers import Method
from fullrank.compress.targets import Patterns, factorisable
from fullrank.core.errors import InputError
from fullrank.core.progress import progress as progress_bar

Metric = Callable[[Any], "npt.ArrayLike | float"]
Recover = Callable[[nn.Module], None]

# How many candidates a time limit leaves room for: with fewer there is nothing to choose from.
_CANDIDATES_IN_TIME = 3


def shrink(
    model: nn.Module,
    metric: Metric,
    floor: float = 0.97,
    *,
    calibration: Iterable[Any] | CalibrationStats,
    relative: bool = True,
    clusters: Sequence[Any] | None = None,
    candidates: Sequence[float] | None = None,
    recover: Recover | Literal[False] | None = None,
    method: Method = "gauss_newton",
    allocation: Allocation = "sensitivity",
    include: Patterns | None = None,
    exclude: Patterns = (),
    start: float = 0.6,
    lowest: float = 0.2,
    resolution: float = 0.02,
    max_candidates: int = 6,
    seconds: float | None = None,
    confidence: float = 0.95,
    batch_size: int = 32,
    max_length: int | None = None,
    tokenizer: Callable[..., Any] | None = None,
    progress: bool = True,
    seed: int = 0,
) -> Shrunk:
    """Find the smallest plan under which a metric stays at or above a floor.

    One pass over calibration data, forward and backward, says how strongly the model's output
    reacts to an error in each direction of each layer. Ranks are then given out so that the
    predicted error of the whole is least for a number of parameters, which makes one nested
    family of plans from large to small. The search walks along it: build, recover, measure,
    until the smallest plan that holds the floor is known to the resolution asked for.

    Parameters
    ----------
    model
        It is not changed.
    metric
        Called with a model; returns one number a query, higher is better, or a single number.
        Queries come in the same order every time.
    floor
        Share of the original's mean to keep (``relative``), or the mean itself. It holds when
        the lower end of a one-sided paired bootstrap interval is at or above it; a metric that
        is a single number has no interval and is compared as it is.
    calibration
        Texts, or batches, like those the model will see: a few hundred. Or statistics collected
        from them with ``gradients=True``, and then ``recover`` must be given.
    relative
        Whether ``floor`` is a share of the original's mean.
    clusters
        One label a query: the bootstrap draws whole clusters.
    candidates
        Shares of the factorisable layers' parameters to measure, all of them; None bisects
        between ``lowest`` and 1, beginning with ``start``, until the answer is known to
        ``resolution`` or ``max_candidates`` were measured.
    recover
        Called with each candidate before it is measured, to fine-tune it in place; None distils
        the original's outputs on the calibration data (:class:`~fullrank.compress.Distillation`),
        False does nothing.
    method, allocation
        See :class:`~fullrank.compress.PlanFamily`.
    include, exclude
        Name patterns; see :func:`~fullrank.compress.make_plan`.
    seconds
        Do not begin another candidate that would not be done by then; recovery is boxed to fit
        at least three. None: no limit.
    confidence
        Of the interval.
    batch_size, max_length, tokenizer
        Of calibration texts.
    progress
        Show bars.
    seed
        Of probes, recovery and batches.

    Returns
    -------
    Shrunk
        The model, its plan, and everything that was measured. The plan was chosen on the data
        of ``metric``: test it once more on data it never saw.

    Raises
    ------
    FloorError
        When no measured plan holds the floor; it carries the best found and the curve.
    InputError
        On data, a metric or an argument that cannot be used.

    Examples
    --------
    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> model, data = nn.Sequential(nn.Linear(32, 32)), [torch.randn(100, 32) for _ in range(4)]
    >>> with torch.no_grad():
    ...     _ = model[0].weight[4:].mul_(0.01)
    >>> def closeness(candidate):
    ...     with torch.no_grad():
    ...         error = (candidate(data[0]) - model(data[0])).square().mean()
    ...     return float(1 / (1 + error))
    >>> found = shrink(model, closeness, 0.95, calibration=data, recover=False, progress=False)
    >>> found.plan["0"].rank <= 8
    True
    """
    _check_arguments(floor, relative, candidates, start, lowest, resolution, max_candidates)
    began = time.monotonic()
    targets = factorisable(model, include, exclude)
    source, stats = None, calibration
    if not isinstance(stats, CalibrationStats):
        source = list(
            Batches(
                model,
                calibration,
                batch_size=batch_size,
                max_length=max_length,
                tokenizer=tokenizer,
            )
        )
        stats = CalibrationStats(targets, gradients=method == "gauss_newton")
        stats.observe(model, Batches(model, source), progress=progress, seed=seed)
    elif recover is None:
        raise InputError("recovery needs calibration data, not statistics; or recover=False")
    family = PlanFamily(
        model, stats, method=method, allocation=allocation, include=include, exclude=exclude
    )
    measured = time.monotonic()
    reference = _measure(metric, model, None, clusters)
    if not reference.mean() > 0:
        raise InputError(f"the model's own metric is {reference.mean()}; it must be positive")
    if recover is None and source is not None:
        recover = Distillation(model, source, seed=seed, progress=progress)
        if seconds is not None:
            now = time.monotonic()
            each = (seconds - (now - began)) / _CANDIDATES_IN_TIME
            recover.seconds = max(1.0, each - (now - measured))
    search = _Search(
        family, metric, reference, floor, relative, clusters, confidence, recover or False
    )
    with progress_bar("shrink", None, progress, "candidates") as advance:
        for keep in _order(search, candidates, start, lowest, resolution, max_candidates):
            slowest = max((c.seconds for c in search.curve), default=0.0)
            if (
                seconds is not None
                and time.monotonic() - began + slowest > seconds
                and search.curve
            ):
                break
            search.measure(keep)
            advance(1)
    return search.result()


class _Search:
    """Measures candidates and remembers them."""

    def __init__(
        self,
        family: PlanFamily,
        metric: Metric,
        reference: npt.NDArray[np.float64],
        floor: float,
        relative: bool,
        clusters: Sequence[Any] | None,
        confidence: float,
        recover: Recover | Literal[False],
    ) -> None:
        self.family, self.metric, self.reference = family, metric, reference
        self.floor, self.relative, self.clusters = floor, relative, clusters
        self.confidence, self.recover = confidence, recover
        self.curve: list[Candidate] = []
        self.chosen: tuple[Candidate, nn.Module, FloorTest] | None = None

    def measure(self, keep: float) -> Candidate:
        began = time.monotonic()
        plan = self.family.plan(keep)
        model = self.family.build(plan)
        if self.recover:
            self.recover(model)
        values = _measure(self.metric, model, self.reference, self.clusters)
        test = self._test(values)
        savings = plan.savings()
        candidate = Candidate(
            plan,
            savings.kept,
            savings.planned,
            sum(p.numel() for p in model.parameters()),
            float(values.mean()),
            float(test.ratio),
            float(test.lower),
            bool(test.holds),
            time.monotonic() - began,
        )
        self.curve.append(candidate)
        if candidate.holds and (self.chosen is None or candidate.kept < self.chosen[0].kept):
            self.chosen = candidate, model, test
        return candidate

    def _test(self, values: npt.NDArray[np.float64]) -> FloorTest:
        # An absolute floor is a share of one.
        base = self.reference if self.relative else np.ones_like(values)
        if len(values) == 1:
            ratio = float(values[0] / base[0])
            return PointTest(ratio, ratio, ratio >= self.floor)
        from fullrank.evaluate import floor_test

        test: FloorTest = floor_test(
            values, base, self.floor, clusters=self.clusters, confidence=self.confidence
        )
        return test

    def result(self) -> Shrunk:
        curve = tuple(sorted(self.curve, key=lambda c: c.kept))
        if self.chosen is None:
            best = max(curve, key=lambda c: c.lower, default=None)
            found = (
                f"; the best of {len(curve)} keeps {best.kept:.0%} of the linear parameters and "
                f"reaches {best.ratio:.4f} (lower end {best.lower:.4f})"
                if best is not None
                else ""
            )
            raise FloorError(
                f"no plan measured holds the floor of {self.floor:g}{found}. Lower the floor, "
                "allow more candidates or recovery, or measure on more queries",
                best,
                curve,
            )
        candidate, model, test = self.chosen
        return Shrunk(
            model,
            candidate.plan,
            curve,
            test,
            self.floor,
            self.relative,
            float(self.reference.mean()),
        )


def _order(
    search: _Search,
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


def _measure(
    metric: Metric,
    model: nn.Module,
    reference: npt.NDArray[np.float64] | None,
    clusters: Sequence[Any] | None,
) -> npt.NDArray[np.float64]:
    values = np.atleast_1d(np.asarray(metric(model), dtype=np.float64))
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


def _check_arguments(
    floor: float,
    relative: bool,
    candidates: Sequence[float] | None,
    start: float,
    lowest: float,
    resolution: float,
    max_candidates: int,
) -> None:
    if not floor > 0 or (relative and floor > 1):
        raise InputError(f"floor {floor}; a share of the original lies in (0, 1]")
    if candidates is not None and (
        len(candidates) == 0 or not all(0 < share <= 1 for share in candidates)
    ):
        raise InputError(f"candidates {list(candidates)}; shares in (0, 1] are expected")
    if not 0 < lowest <= start <= 1:
        raise InputError(f"lowest={lowest}, start={start}; 0 < lowest <= start <= 1 is expected")
    if not resolution > 0 or max_candidates < 1:
        raise InputError(f"resolution={resolution}, max_candidates={max_candidates}: not positive")
