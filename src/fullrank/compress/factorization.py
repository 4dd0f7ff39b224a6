"""`factorize`: replace the layers a plan names by two thin ones each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from fullrank.compress.batches import Batches
from fullrank.compress.calibration import CalibrationStats
from fullrank.compress.layers_build import build_layer, check_method, shell
from fullrank.compress.layers_record import Factorised
from fullrank.compress.layers_record import factorised as factorised
from fullrank.compress.matrices import matricise
from fullrank.compress.measured_speed import faster_only
from fullrank.compress.planning import WITHOUT_DATA
from fullrank.compress.solvers import Balance
from fullrank.compress.targets import shared_weights, shares
from fullrank.core.batches import Batch
from fullrank.core.errors import InputError, PlanError
from fullrank.core.names import canonical_modules
from fullrank.core.plan import RankPlan
from fullrank.core.progress import progress as progress_bar

# Fewer samples than this many a dimension leave directions that the data hardly shows.
_SAMPLES_PER_DIMENSION = 10


def factorize(
    model: nn.Module,
    plan: RankPlan,
    calibration: CalibrationStats | Iterable[Any] | None = None,
    *,
    init: bool = True,
    balance: Balance | None = None,
    sequential: bool = False,
    faster_on: Batch | None = None,
    progress: bool = True,
) -> nn.Module:
    """Replace the layers a plan names by two thin ones each, in place.

    Everything is checked before the first layer changes. A layer is never made bigger: an
    entry at or above break-even leaves it as it is. A module used in several places is
    factorised once and stays shared; a layer whose weight or bias other modules hold too is left
    alone.

    Parameters
    ----------
    model
        Changed in place; take ``copy.deepcopy(model)`` first to keep the original.
    plan
        From :func:`make_plan`, a method, or by hand.
    calibration
        What ``"output_pca"`` and ``"gauss_newton"`` need: statistics, texts (for a
        SentenceTransformer) or batches.
    init
        False only builds the shapes, for a checkpoint to be loaded into.
    balance
        How each component's scale is shared between the factors; see
        :func:`~fullrank.compress.split`.
    sequential
        Collect each layer's statistics after the layers before it are replaced. Needs data in
        place of statistics, and one pass over it for every layer.
    faster_on
        A batch of the size that the model will serve: a layer whose factors are slower on it
        than the layer itself, as measured on this machine, is left as it is (see
        :func:`~fullrank.compress.measured_speed.faster_only`). None: nothing is measured.
    progress
        Show a bar.

    Returns
    -------
    Module
        The same model. A transformers model inside it now saves and loads by its own
        ``save_pretrained`` and ``from_pretrained``; :func:`report` tells what was done.

    Raises
    ------
    PlanError
        When the plan is for another model or purpose.
    InputError
        When calibration data is missing, empty, constant or not finite, or a weight is not
        finite.

    Examples
    --------
    >>> from fullrank.core.plan import PlanEntry
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> factorize(model, RankPlan({"0": PlanEntry((16, 16), 2)}))
    Sequential(
      (0): LowRankLinear(in_features=16, out_features=16, rank=2, bias=True)
    )
    """
    targets = _check(model, plan)
    if faster_on is not None:
        plan = faster_only(model, plan, faster_on)
        targets = {name: module for name, module in targets.items() if plan[name].rank is not None}
    data_driven = init and any(plan[name].method not in WITHOUT_DATA for name in targets)
    if data_driven and calibration is None:
        raise InputError("this plan's methods need calibration data; pass calibration=")
    if sequential and isinstance(calibration, CalibrationStats):
        raise InputError("sequential factorisation needs data, not statistics of the old model")
    stats = None
    if data_driven and not sequential:
        stats = _statistics(model, targets, plan, calibration, progress)
        _warn_if_few(stats, targets)
    new: dict[str, Factorised] = {}
    with progress_bar("factorise", len(targets), progress, "layers") as advance:
        for name, module in targets.items():
            advance(1)
            if not init:
                new[name] = shell(module, plan[name])
                continue
            layers = stats
            if sequential and data_driven:
                layers = _statistics(model, {name: module}, plan, calibration, False)
            layer = layers[name] if layers is not None and name in layers else None
            new[name] = build_layer(module, plan[name], layer, balance)
            if sequential:
                replace_modules(model, {name: new[name]})
    replace_modules(model, new)
    mark(model)
    return model


def mark(model: nn.Module) -> None:
    """Let transformers models know what was factorised in them, so that they save it.

    Call it after ranks change (``truncate``) and before ``save_pretrained``.
    """
    # A model that needs transformers has imported it.
    if "transformers.modeling_utils" in sys.modules:
        from fullrank.compress.hub import mark_pretrained

        mark_pretrained(model)


def _check(model: nn.Module, plan: RankPlan) -> dict[str, nn.Module]:
    """Find the layers to replace, or say why the plan cannot be applied."""
    shared = shared_weights(model)
    targets = {}
    for name, module in plan.check(model, "factor").items():
        entry = plan[name]
        assert entry.rank is not None
        if entry.rank > entry.break_even or shares(module, shared):
            continue
        if isinstance(module, Factorised):
            raise PlanError(f"{name} is factorised already; apply plans to the dense model")
        try:
            found = matricise(module, entry.scheme)
            check_method(module, entry)
        except InputError as error:
            raise InputError(f"{name}: {error}") from None
        if (found.stack, *found.shape) != (entry.stack, *entry.matrix_shape):
            raise PlanError(
                f"{name}: the plan is for {_sizes(entry.stack, entry.matrix_shape)}, the layer is "
                f"{_sizes(found.stack, found.shape)} (out, in)"
            )
        if not found.matrix.is_meta and not torch.isfinite(found.matrix).all():
            raise InputError(f"{name}: the weight holds NaN or infinite values")
        targets[name] = module
    return targets


def _sizes(stack: int, shape: tuple[int, int]) -> str:
    return str(shape) if stack == 1 else f"{stack} matrices {shape}"


def _statistics(
    model: nn.Module,
    targets: dict[str, nn.Module],
    plan: RankPlan,
    calibration: CalibrationStats | Iterable[Any] | None,
    progress: bool,
) -> CalibrationStats:
    needed = [name for name in targets if plan[name].method not in WITHOUT_DATA]
    if isinstance(calibration, CalibrationStats):
        missing = [n for n in needed if n not in calibration or calibration[n].count == 0]
        if missing:
            raise InputError(
                f"the calibration statistics know nothing of {missing[0]!r}"
                + (f" and {len(missing) - 1} other layers" if len(missing) > 1 else "")
            )
        return calibration
    assert calibration is not None
    gradients = any(plan[name].method == "gauss_newton" for name in needed)
    stats = CalibrationStats({name: targets[name] for name in needed}, gradients=gradients)
    return stats.observe(model, Batches(model, calibration), progress=progress)


def _warn_if_few(stats: CalibrationStats, targets: dict[str, nn.Module]) -> None:
    few = [
        name
        for name in targets
        if name in stats and stats[name].count < _SAMPLES_PER_DIMENSION * stats[name].moments.width
    ]
    if few:
        seen = stats[few[0]]
        warnings.warn(
            f"{len(few)} layers saw few calibration samples, e.g. {few[0]}: {seen.count} for "
            f"{seen.moments.width} dimensions; at least {_SAMPLES_PER_DIMENSION} a dimension "
            "make factors that hold on other data",
            stacklevel=4,
        )


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put new layers where modules of these canonical names are, everywhere they are used."""
    by_name = dict(canonical_modules(model))
    substitute = {id(by_name[name]): layer for name, layer in new.items()}
    if id(model) in substitute:
        raise InputError(
            f"the model is itself the {type(model).__name__} to replace, which cannot be done in "
            "place; wrap it: nn.Sequential(layer)"
        )
    for parent in list(model.modules()):
        # Not named_children(), which shows a module that one parent holds twice only once.
        for child, held in list(parent._modules.items()):
            if held is not None and id(held) in substitute:
                parent._modules[child] = substitute[id(held)]
