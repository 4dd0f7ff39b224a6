"""One-shot methods by name: the plan of each that keeps a share of a model's parameters."""

from __future__ import annotations

from typing import Literal, cast, get_args

from torch import nn

from fullrank.compress.calibration import CalibrationStats
from fullrank.compress.family import Allocation, PlanFamily
from fullrank.compress.planning import layer_spectra, make_plan
from fullrank.compress.solvers import Method
from fullrank.compress.welore import WeLoreConfig, welore_plan
from fullrank.core.errors import InputError
from fullrank.core.plan import RankPlan
from fullrank.core.rank_rules import FractionOfBreakEven

OneShot = Literal["gauss_newton", "lord", "output_pca", "pca", "svd", "greenformers", "welore"]

# Solver and allocation of the methods that PlanFamily makes, and that a search can walk along.
FAMILIES: dict[str, tuple[Method, Allocation]] = {
    "gauss_newton": ("gauss_newton", "sensitivity"),
    "lord": ("output_pca", "sensitivity"),
    "output_pca": ("output_pca", "sensitivity"),
    "pca": ("output_pca", "uniform"),
    "svd": ("svd", "sensitivity"),
}
# Those that look at the weights alone.
DATA_FREE = ("greenformers", "welore")
_TRAINED = {
    "pela": "fullrank.compress.pela_compress and PELATrainer",
    "trp": "fullrank.compress.TRP and TRPCallback",
    "maestro": "fullrank.compress.Maestro and MaestroTrainer",
}
# Halvings of the threshold's range: beyond this two thresholds are one number.
_HALVINGS = 60


def check_one_shot(method: str) -> OneShot:
    """Return the method, or say which there are and what to call for those that train.

    >>> check_one_shot("welore")
    'welore'
    """
    if method in _TRAINED:
        raise InputError(f"{method} shrinks by training: call {_TRAINED[method]}")
    if method not in get_args(OneShot):
        raise InputError(f"method {method!r}; it is one of {', '.join(get_args(OneShot))}")
    return cast(OneShot, method)


def plan_for_share(
    model: nn.Module, method: OneShot, keep: float, stats: CalibrationStats | None = None
) -> RankPlan:
    """Plan by a one-shot method so that at most a share of the layers' parameters is left.

    Parameters
    ----------
    model
        It is not changed.
    method
        ``"gauss_newton"`` (ours); ``"lord"`` (feature PCA, ranks for the whole model; also
        ``"output_pca"``), ``"pca"`` (feature PCA, the same share for every layer), ``"svd"`` (of
        the weights, ranks for the whole model), ``"greenformers"`` (SVD, a share of each layer's
        break-even rank) and ``"welore"`` (the smallest threshold that does).
    keep
        Share, in (0, 1].
    stats
        What the layers saw; all but ``"greenformers"`` and ``"welore"`` need them.

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
    if not 0 < keep <= 1:
        raise InputError(f"the share to keep is {keep}; it must lie in (0, 1]")
    if method == "greenformers":
        return make_plan(model, FractionOfBreakEven(keep))
    if method == "welore":
        return _welore(model, keep)
    if stats is None:
        raise InputError(f"method {method!r} needs calibration data")
    solver, allocation = FAMILIES[method]
    return PlanFamily(model, stats, method=solver, allocation=allocation).plan(keep)


def _welore(model: nn.Module, keep: float) -> RankPlan:
    """Bisect the threshold: what is kept never grows with it."""
    spectra = layer_spectra(model)

    def plan(theta: float) -> RankPlan:
        return welore_plan(model, WeLoreConfig(theta=theta), spectra)

    low, high = 0.0, 1.0
    best = plan(high)
    if (least := best.savings().kept) > keep:
        raise InputError(f"welore keeps at least {least:.1%} of these layers; {keep:.1%} was asked")
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = plan(middle)
        if tried.savings().kept <= keep:
            best, high = tried, middle
        else:
            low = middle
    return best
