"""`shrink`: the smallest plan that keeps a metric at or above a floor."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, cast

from torch import nn

from fullrank.compress.batches import Batches
from fullrank.compress.calibration import CalibrationStats
from fullrank.compress.curve import Shrunk
from fullrank.compress.distill import Distillation
from fullrank.compress.family import Allocation, Family, PlanFamily
from fullrank.compress.family_weights import WeightFamily, WeightMethod
from fullrank.compress.pela_recovery import PELARecovery
from fullrank.compress.planning_share import DATA_FREE
from fullrank.compress.search import Metric, Recover, Search, measured, order
from fullrank.compress.search_record import SearchRecord
from fullrank.compress.solvers import Method
from fullrank.compress.targets import Patterns, factorisable
from fullrank.core.batches import Batch
from fullrank.core.errors import InputError
from fullrank.core.progress import progress as progress_bar

# How many candidates a time limit leaves room for: with fewer there is nothing to choose from.
_CANDIDATES_IN_TIME = 3


def shrink(
    model: nn.Module,
    metric: Metric,
    floor: float = 0.97,
    *,
    calibration: Iterable[Any] | CalibrationStats | None = None,
    relative: bool = True,
    lower_is_better: bool = False,
    clusters: Sequence[Any] | None = None,
    candidates: Sequence[float] | None = None,
    recover: Recover | Literal[False] | None = None,
    method: Method | WeightMethod | Family = "gauss_newton",
    allocation: Allocation = "sensitivity",
    include: Patterns | None = None,
    exclude: Patterns = (),
    faster_on: Batch | None = None,
    record: SearchRecord | None = None,
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
        Called with a model; returns one number a query, or a single number. Queries come in the
        same order every time.
    floor
        Share of the original's mean to keep (``relative``), or the mean itself; of a metric that
        is better when lower, the largest multiple of it (at least 1), or the largest mean. It
        holds when the lower end of a one-sided paired bootstrap interval is at or above it; a
        metric that is a single number has no interval and is compared as it is.
    calibration
        Texts, or batches, like those the model will see: a few hundred. Or statistics collected
        from them with ``gradients=True``, and then ``recover`` must be given. Methods that look at
        the weights alone need none, but for recovery.
    relative
        Whether ``floor`` is a share of the original's mean.
    lower_is_better
        Whether the metric is a loss, e.g. bits per byte. Ratios are then of the original's mean
        to the candidate's, so that higher ones are better everywhere.
    clusters
        One label a query: the bootstrap draws whole clusters.
    candidates
        Shares of the factorisable layers' parameters to measure, all of them; None bisects
        between ``lowest`` and 1, beginning with ``start``, until the answer is known to
        ``resolution`` or ``max_candidates`` were measured.
    recover
        Called with each candidate before it is measured, to fine-tune it in place; None distils
        the original's outputs on the calibration data (:class:`~fullrank.compress.Distillation`;
        with ``method="pela"`` :class:`~fullrank.compress.PELARecovery`), False does nothing.
    method, allocation
        See :class:`~fullrank.compress.PlanFamily`; or ``"greenformers"``, ``"welore"`` or
        ``"pela"``, see :class:`~fullrank.compress.WeightFamily`. Or a family of plans itself, such
        as :class:`~fullrank.compress.TrainedFamily`; then ``include``, ``exclude`` and
        ``faster_on`` are its own.
    include, exclude
        Name patterns; see :func:`~fullrank.compress.make_plan`.
    faster_on
        A batch of the size that the model will serve: layers that are slower factorised stay
        dense, see :func:`~fullrank.compress.faster_only`.
    record
        Where measured candidates are kept: what it holds already is not measured again.
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
    _check_arguments(floor, relative, lower_is_better, candidates, start, lowest)
    if not resolution > 0 or max_candidates < 1:
        raise InputError(f"resolution={resolution}, max_candidates={max_candidates}: not positive")
    began = time.monotonic() - (0.0 if record is None else record.seconds)
    factorisable(model, include, exclude)
    source = stats = None
    if isinstance(calibration, CalibrationStats):
        stats = calibration
    elif calibration is not None:
        how = {"batch_size": batch_size, "max_length": max_length, "tokenizer": tokenizer}
        source = list(Batches(model, calibration, **cast(Any, how)))
    if recover is None and source is None:
        raise InputError("recovery needs calibration data, not statistics; or recover=False")
    family = _family(
        model, method, allocation, include, exclude, faster_on, stats, source, progress, seed
    )
    if candidates is not None and min(candidates) < family.smallest:
        raise InputError(
            f"candidates {list(candidates)}: these layers cannot be made smaller than "
            f"{family.smallest:.1%} of their parameters by this method"
        )
    before = time.monotonic()
    reference = None if record is None else record.reference
    if reference is None:
        reference = measured(metric, model, None, clusters)
    if not reference.mean() > 0:
        raise InputError(f"the model's own metric is {reference.mean()}; it must be positive")
    if record is not None:
        record.reference = reference
    if recover is None and source is not None:
        kind = PELARecovery if method == "pela" else Distillation
        recover = kind(model, source, seed=seed, progress=progress)
        if seconds is not None:
            now = time.monotonic()
            each = (seconds - (now - began)) / _CANDIDATES_IN_TIME
            recover.seconds = max(1.0, each - (now - before))
    search = Search(
        family,
        metric,
        reference,
        floor,
        relative,
        lower_is_better,
        clusters,
        confidence,
        recover or False,
        record,
    )
    with progress_bar("shrink", None, progress, "candidates") as advance:
        for keep in order(search, candidates, start, lowest, resolution, max_candidates):
            slowest = max((c.seconds for c in search.curve), default=0.0)
            known = record is not None and record.get(keep) is not None
            late = seconds is not None and time.monotonic() - began + slowest > seconds
            if late and search.curve and not known:
                break
            search.measure(keep)
            advance(1)
    return search.result()


def _family(
    model: nn.Module,
    method: Method | WeightMethod | Family,
    allocation: Allocation,
    include: Patterns | None,
    exclude: Patterns,
    faster_on: Batch | None,
    stats: CalibrationStats | None,
    source: list[Batch] | None,
    progress: bool,
    seed: int,
) -> Family:
    if not isinstance(method, str):
        return method
    if method in DATA_FREE:
        return WeightFamily(model, method, include=include, exclude=exclude, faster_on=faster_on)
    if stats is None:
        if source is None:
            raise InputError(f"method {method!r} needs calibration data")
        targets = factorisable(model, include, exclude)
        stats = CalibrationStats(targets, gradients=method == "gauss_newton")
        stats.observe(model, Batches(model, source), progress=progress, seed=seed)
    return PlanFamily(
        model,
        stats,
        method=cast(Method, method),
        allocation=allocation,
        include=include,
        exclude=exclude,
        faster_on=faster_on,
        progress=progress,
    )


def _check_arguments(
    floor: float,
    relative: bool,
    lower_is_better: bool,
    candidates: Sequence[float] | None,
    start: float,
    lowest: float,
) -> None:
    if not floor > 0 or (relative and not lower_is_better and floor > 1):
        raise InputError(f"floor {floor}; a share of the original lies in (0, 1]")
    if relative and lower_is_better and floor < 1:
        raise InputError(f"floor {floor}; of a loss, a multiple of the original's, at least 1")
    if candidates is not None and (
        len(candidates) == 0 or not all(0 < share <= 1 for share in candidates)
    ):
        raise InputError(f"candidates {list(candidates)}; shares in (0, 1] are expected")
    if not 0 < lowest <= start <= 1:
        raise InputError(f"lowest={lowest}, start={start}; 0 < lowest <= start <= 1 is expected")
