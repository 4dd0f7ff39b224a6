"""Methods by name, and of the one-shot ones the plan that keeps a share of the parameters."""

from __future__ import annotations

from typing import Literal, cast, get_args

from torch import nn

from fullrank.compress.calibration import CalibrationStats
from fullrank.compress.family import Allocation, Family, PlanFamily
from fullrank.compress.family_training import TrainedMethod
from fullrank.compress.family_weights import WeightFamily, WeightMethod
from fullrank.compress.solvers import Method
from fullrank.compress.targets import Patterns
from fullrank.core.batches import Batch
from fullrank.core.errors import InputError
from fullrank.core.plan import RankPlan

OneShot = Literal[
    "gauss_newton", "lord", "output_pca", "pca", "svd", "greenformers", "welore", "pela"
]

# Solver and allocation of the methods that PlanFamily makes.
_FAMILIES: dict[str, tuple[Method, Allocation]] = {
    "gauss_newton": ("gauss_newton", "sensitivity"),
    "lord": ("output_pca", "sensitivity"),
    "output_pca": ("output_pca", "sensitivity"),
    "pca": ("output_pca", "uniform"),
    "svd": ("svd", "sensitivity"),
}
# Those that look at the weights alone.
DATA_FREE: tuple[WeightMethod, ...] = get_args(WeightMethod)
# Those that train before there is a plan.
TRAINED: tuple[TrainedMethod, ...] = get_args(TrainedMethod)


def check_method(method: str) -> OneShot | TrainedMethod:
    """Return the method, or say which there are.

    >>> check_method("welore")
    'welore'
    """
    known = (*get_args(OneShot), *TRAINED)
    if method not in known:
        raise InputError(f"method {method!r}; it is one of {', '.join(known)}")
    return cast("OneShot | TrainedMethod", method)


def family_for(
    model: nn.Module,
    method: OneShot,
    stats: CalibrationStats | None = None,
    *,
    include: Patterns | None = None,
    exclude: Patterns = (),
    faster_on: Batch | None = None,
    progress: bool = False,
) -> Family:
    """Return the plans of every size by a method, named as the command line names it.

    Parameters
    ----------
    model
        It is not changed.
    method
        ``"gauss_newton"`` (ours); ``"lord"`` (feature PCA, ranks for the whole model; also
        ``"output_pca"``), ``"pca"`` (feature PCA, the same share for every layer), ``"svd"`` (of
        the weights, ranks for the whole model), ``"greenformers"`` (SVD, a share of each layer's
        break-even rank), ``"welore"`` (the smallest threshold that does) and ``"pela"`` (SVD, the
        same share for every layer, to be trained).
    stats
        What the layers saw; the last three do without.
    include, exclude
        Name patterns; see :func:`~fullrank.compress.make_plan`.
    faster_on, progress
        See :class:`~fullrank.compress.PlanFamily`.

    Raises
    ------
    InputError
        Without the statistics a method needs.
    """
    if method in DATA_FREE:
        return WeightFamily(model, method, include=include, exclude=exclude, faster_on=faster_on)
    if stats is None:
        raise InputError(f"method {method!r} needs calibration data")
    solver, allocation = _FAMILIES[method]
    return PlanFamily(
        model,
        stats,
        method=solver,
        allocation=allocation,
        include=include,
        exclude=exclude,
        faster_on=faster_on,
        progress=progress,
    )


def plan_for_share(
    model: nn.Module, method: OneShot, keep: float, stats: CalibrationStats | None = None
) -> RankPlan:
    """Plan by a method so that at most a share of the layers' parameters is left.

    Parameters
    ----------
    model, method, stats
        See :func:`family_for`.
    keep
        Share, in (0, 1].

    Raises
    ------
    InputError
        On a share that cannot be reached, or without the statistics a method needs.

    Examples
    --------
    >>> plan = plan_for_share(nn.Sequential(nn.Linear(16, 16)), "greenformers", 0.5)
    >>> plan["0"].rank, plan.savings().kept
    (4, 0.5)
    """
    return family_for(model, method, stats).plan(keep)
