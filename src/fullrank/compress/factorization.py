"""`factorize`: replace the layers a plan names by two thin ones each."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fullrank.compress.batches import Batches
from fullrank.compress.calibration import CalibrationStats
from fullrank.compress.layers import LowRankLinear
from fullrank.compress.matrices import is_conv1d, matricise
from fullrank.compress.planning import plan_method
from fullrank.compress.solvers import Balance, Decomposition, decompose, default_balance
from fullrank.compress.targets import shared_weights
from fullrank.core.errors import InputError, PlanError
from fullrank.core.names import canonical_name
from fullrank.core.plan import PlanEntry, RankPlan, break_even
from fullrank.core.table import Cell, Table

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
    progress: bool = True,
) -> nn.Module:
    """Replace the layers a plan names by two thin ones each, in place.

    Everything is checked before the first layer changes. A layer is never made bigger: an
    entry at or above break-even leaves it as it is. A module used in several places is
    factorised once and stays shared; a weight that other modules hold too is left alone.

    Parameters
    ----------
    model
        Changed in place; take ``copy.deepcopy(model)`` first to keep the original.
    plan
        From :func:`make_plan`, a method, or by hand.
    calibration
        What methods other than ``"svd"`` need: statistics, texts (for a SentenceTransformer) or
        batches.
    init
        False only builds the shapes, for a checkpoint to be loaded into.
    balance
        How each component's scale is shared between the factors; see
        :func:`~fullrank.compress.split`.
    sequential
        Collect each layer's statistics after the layers before it are replaced. Needs data in
        place of statistics, and one pass over it for every layer.
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
    data_driven = init and any(plan[name].method != "svd" for name in targets)
    if data_driven and calibration is None:
        raise InputError("this plan's methods need calibration data; pass calibration=")
    if sequential and isinstance(calibration, CalibrationStats):
        raise InputError("sequential factorisation needs data, not statistics of the old model")
    stats = None
    if data_driven and not sequential:
        stats = _statistics(model, targets, plan, calibration, progress)
        _warn_if_few(stats, targets)
    if not init:
        new = {name: _shell(module, plan[name]) for name, module in targets.items()}
    else:
        new = {}
        for name, module in targets.items():
            layers, entry = stats, plan[name]
            if sequential and data_driven:
                layers = _statistics(model, {name: module}, plan, calibration, False)
            layer = layers[name] if layers is not None and name in layers else None
            solved = decompose(matricise(module).matrix, plan_method(entry), layer)
            new[name] = factorised_layer(module, entry, solved, balance)
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


def factorised_layer(
    module: nn.Module,
    entry: PlanEntry,
    solved: Decomposition,
    balance: Balance | None = None,
) -> LowRankLinear:
    """Build the layer that stands for ``module`` under a plan's entry."""
    assert entry.rank is not None
    factors = solved.truncate(entry.rank, balance or default_balance(entry.method))
    old = module.bias if isinstance(module.bias, torch.Tensor) else None
    layer = _shell(module, entry, bias=old is not None or factors.bias_shift is not None)
    with torch.no_grad():
        layer.first.copy_(factors.first)
        layer.second.copy_(factors.second)
        if isinstance(layer.bias, torch.Tensor):
            layer.bias.zero_()
            wide = layer.bias.double() if old is None else old.double()
            if factors.bias_shift is not None:
                wide = wide + factors.bias_shift.to(wide)
            layer.bias.copy_(wide)
    layer.error = factors.error
    return layer


def _shell(module: nn.Module, entry: PlanEntry, bias: bool | None = None) -> LowRankLinear:
    if bias is None:
        bias = entry.method != "svd" or getattr(module, "bias", None) is not None
    shape = list(matricise(module).matrix.shape)
    record = {"shape": shape, "rank": entry.rank, "bias": bias, "method": entry.method}
    return shell_for(module, record)


def _check(model: nn.Module, plan: RankPlan) -> dict[str, nn.Module]:
    """Find the layers to replace, or say why the plan cannot be applied."""
    shared = shared_weights(model)
    targets = {}
    for name, module in plan.check(model, "factor").items():
        rank = plan[name].rank
        if rank is None or rank > break_even(*plan[name].shape) or id(module.weight) in shared:
            continue
        if isinstance(module, LowRankLinear):
            raise PlanError(f"{name} is factorised already; apply plans to the dense model")
        found = matricise(module)
        if tuple(found.matrix.shape) != plan[name].shape:
            raise PlanError(
                f"{name}: the plan is for {plan[name].shape}, the layer is "
                f"{tuple(found.matrix.shape)} (out, in)"
            )
        if not found.matrix.is_meta and not torch.isfinite(found.matrix).all():
            raise InputError(f"{name}: the weight holds NaN or infinite values")
        targets[name] = module
    return targets


def _statistics(
    model: nn.Module,
    targets: dict[str, nn.Module],
    plan: RankPlan,
    calibration: CalibrationStats | Iterable[Any] | None,
    progress: bool,
) -> CalibrationStats:
    needed = [name for name in targets if plan[name].method != "svd"]
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
    by_name = {canonical_name(name): module for name, module in model.named_modules()}
    substitute = {id(by_name[name]): layer for name, layer in new.items()}
    for parent in list(model.modules()):
        # Not named_children(), which shows a module that one parent holds twice only once.
        for child, held in list(parent._modules.items()):
            if held is not None and id(held) in substitute:
                parent._modules[child] = substitute[id(held)]


def factorised(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Yield ``(canonical name, layer)`` of every factorised layer, shared ones once."""
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear):
            yield canonical_name(name), module


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """List the factorised layers of a model as files record them (JSON values only)."""
    return {
        name: {
            "shape": [layer.out_features, layer.in_features],
            "rank": layer.rank,
            "bias": layer.bias is not None,
            "method": layer.method,
            "error": layer.error,
        }
        for name, layer in factorised(model)
    }


def shell_for(module: nn.Module, record: Mapping[str, Any]) -> LowRankLinear:
    """Build an empty factorised layer from its record, in the place of ``module``."""
    m, n = record["shape"]
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    layer = LowRankLinear(
        n,
        m,
        record["rank"],
        record["bias"],
        device=weight.device,
        dtype=weight.dtype,
        transposed=is_conv1d(module),
    )
    layer.method, layer.error = record.get("method", ""), record.get("error")
    return layer.requires_grad_(weight.requires_grad).train(module.training)


def report(model: nn.Module) -> Table:
    """Tell what factorisation did to each layer of a model.

    Examples
    --------
    >>> from fullrank.core.plan import PlanEntry
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> _ = factorize(model, RankPlan({"0": PlanEntry((16, 16), 2)}))
    >>> report(model).rows[0][:4]
    ['0', 2, 256, 64]
    """
    rows: list[list[Cell]] = []
    for name, layer in factorised(model):
        dense = layer.in_features * layer.out_features
        error = None if layer.error is None else float(layer.error)
        kept = layer.rank * (layer.in_features + layer.out_features)
        rows.append([name, layer.rank, dense, kept, kept / dense, layer.method, error])
    return Table(
        ["layer", "rank", "dense", "factors", "kept", "method", "relative error"],
        rows,
        title="Factorised layers",
        formats={"dense": ",d", "factors": ",d", "kept": ".1%", "relative error": ".2%"},
    )
