"""`factorize`: replace the layers a plan names by two thin ones each."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from fullrank.compress.batches import Batches
from fullrank.compress.calibration import CalibrationStats, LayerStats
from fullrank.compress.data_checks import (
    few_samples,
    leave_dense,
    nothing_to_go_by,
    warn_of_few,
)
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
from fullrank.core.plan import PlanEntry, RankPlan
from fullrank.core.progress import progress as progress_bar
from fullrank.linalg.checks import all_finite


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
        place of statistics, and one pass over it for every layer; an iterator is made a list.
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
        finite. The model is then as it was.

    Warns
    -----
    UserWarning
        Of layers that stay dense because nothing varies in them on the data, while others do not;
        and of layers that saw few samples.

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
    if data_driven and sequential and isinstance(calibration, Iterator):
        # Gone through once for every layer.
        calibration = list(calibration)
    with progress_bar("factorise", len(targets), progress, "layers") as advance:
        if not init:
            replace_modules(model, {n: shell(m, plan[n]) for n, m in targets.items()})
        elif data_driven and sequential:
            _one_after_another(model, targets, plan, calibration, balance, advance)
        else:
            stats = None
            if data_driven:
                stats = _statistics(model, targets, plan, calibration, progress)
            replace_modules(model, _at_once(targets, plan, stats, balance, advance))
    mark(model)
    return model


def _at_once(
    targets: Mapping[str, nn.Module],
    plan: RankPlan,
    stats: CalibrationStats | None,
    balance: Balance | None,
    advance: Callable[[int], None],
) -> dict[str, Factorised]:
    """Build all layers from statistics of the model as it is."""
    layers = {n: stats[n] for n in targets if n in stats} if stats is not None else {}
    warn_of_few(few_samples(layers))
    new: dict[str, Factorised] = {}
    dense: dict[str, str] = {}
    for name, module in targets.items():
        advance(1)
        if why := _why_dense(plan[name], layers.get(name)):
            dense[name] = why
        else:
            new[name] = _built(name, module, plan[name], layers.get(name), balance)
    leave_dense(dense, bool(new))
    return new


def _one_after_another(
    model: nn.Module,
    targets: Mapping[str, nn.Module],
    plan: RankPlan,
    data: CalibrationStats | Iterable[Any] | None,
    balance: Balance | None,
    advance: Callable[[int], None],
) -> None:
    """Replace each layer before the next one's statistics; all of them or, on an error, none."""
    done: dict[str, nn.Module] = {}
    few: dict[str, tuple[int, int]] = {}
    dense: dict[str, str] = {}
    try:
        for name, module in targets.items():
            advance(1)
            layer = None
            if plan[name].method not in WITHOUT_DATA:
                layer = _statistics(model, {name: module}, plan, data, False)[name]
                few |= few_samples({name: layer})
            if why := _why_dense(plan[name], layer):
                dense[name] = why
                continue
            replace_modules(model, {name: _built(name, module, plan[name], layer, balance)})
            done[name] = module
        leave_dense(dense, bool(done))
    except BaseException:
        replace_modules(model, done)
        raise
    warn_of_few(few)


def _why_dense(entry: PlanEntry, stats: LayerStats | None) -> str:
    if stats is None or not stats.count or entry.method in WITHOUT_DATA:
        return ""
    return nothing_to_go_by(stats, entry.method)


def _built(
    name: str,
    module: nn.Module,
    entry: PlanEntry,
    stats: LayerStats | None,
    balance: Balance | None,
) -> Factorised:
    try:
        return build_layer(module, entry, stats, balance)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


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
        if not found.matrix.is_meta and not all_finite(found.matrix):
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
