"""`make_plan`: from a rank rule and a model to a `RankPlan`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import numpy as np
from torch import nn

from fullrank.compress.calibration import CalibrationStats
from fullrank.compress.matrices import matricise
from fullrank.compress.solvers import Method, decompose
from fullrank.compress.targets import Patterns, factorisable
from fullrank.core.names import model_fingerprint
from fullrank.core.plan import PlanEntry, RankPlan, break_even
from fullrank.core.rank_rules import LayerSpectrum, ModelRule, RankRule, apply_rule


def layer_spectra(
    model: nn.Module,
    *,
    include: Patterns | None = None,
    exclude: Patterns = (),
    stats: CalibrationStats | None = None,
    method: Method | None = None,
) -> dict[str, LayerSpectrum]:
    """Singular values of every layer that could be factorised, most important first.

    With statistics they are of what the layer puts out on the calibration data (square roots of
    the method's losses), without of its weight. Layers that saw no calibration data are left
    out.

    Parameters
    ----------
    model, include, exclude
        See :func:`make_plan`.
    stats
        What the model's layers saw.
    method
        ``"svd"`` without statistics and ``"output_pca"`` with them, unless told otherwise.
    """
    use = method or ("svd" if stats is None else "output_pca")
    spectra = {}
    for name, module in factorisable(model, include, exclude).items():
        layer = None
        if use != "svd":
            layer = stats.get(name) if stats is not None else None
            if layer is None or not layer.serves(use):
                continue
        matrix = matricise(module).matrix
        loss = decompose(matrix, use, layer).loss.cpu().numpy()
        m, n = matrix.shape
        spectra[name] = LayerSpectrum(np.sqrt(loss)[: min(m, n)], (m, n))
    return spectra


def make_plan(
    model: nn.Module,
    rule: RankRule | ModelRule,
    include: Patterns | None = None,
    exclude: Patterns = (),
    stats: CalibrationStats | None = None,
    *,
    method: Method | None = None,
    spectra: Mapping[str, LayerSpectrum] | None = None,
) -> RankPlan:
    """Decide how much rank each layer gets; nothing in the model changes.

    Parameters
    ----------
    model
        Any module with ``nn.Linear`` (or transformers' ``Conv1D``) layers.
    rule
        See :mod:`fullrank.core.rank_rules`: a function of one layer's spectrum and shape, or an
        object that sees all of them.
    include, exclude
        Shell patterns over canonical names, e.g. ``"*.attention.*"``. By default every layer
        but a language model's output head.
    stats
        What the layers saw on calibration data; spectra are then of their outputs.
    method
        How the factors will be made; see :func:`~fullrank.compress.split`.
    spectra
        From :func:`layer_spectra`, to plan several times at the price of once.

    Returns
    -------
    RankPlan
        For the purpose ``"factor"``. A layer whose factors would not be smaller than its weight
        stays dense, and its entry says so.

    Raises
    ------
    InputError
        When a pattern matches nothing, a weight is not finite, or a rule gives a rank that is
        out of range.

    Examples
    --------
    >>> from fullrank.core.rank_rules import FractionOfBreakEven
    >>> plan = make_plan(nn.Sequential(nn.Linear(16, 16)), FractionOfBreakEven(0.5))
    >>> plan["0"].rank
    4
    """
    use = method or ("svd" if stats is None else "output_pca")
    if spectra is None:
        spectra = layer_spectra(model, include=include, exclude=exclude, stats=stats, method=use)
    ranks = apply_rule(rule, spectra)
    entries = {}
    for name, module in factorisable(model, include, exclude).items():
        m, n = matricise(module).matrix.shape
        if name in spectra:
            entries[name] = entry_for((m, n), ranks[name], use, repr(rule))
        else:
            entries[name] = PlanEntry(
                (m, n), None, use, reason="the model did not use it on the data"
            )
    return RankPlan(
        entries,
        source="weight" if use == "svd" else "activation",
        fingerprint=model_fingerprint(model),
    )


def entry_for(shape: tuple[int, int], rank: int | None, method: str, reason: str) -> PlanEntry:
    """Plan one layer, dense if factors would not be smaller."""
    if rank is None:
        return PlanEntry(shape, None, method, reason=f"{reason}: left dense")
    if rank > break_even(*shape):
        why = f"{reason}: rank {rank} saves nothing (break-even is {break_even(*shape)})"
        return PlanEntry(shape, None, method, reason=why)
    return PlanEntry(shape, rank, method, reason=reason)


def plan_method(entry: PlanEntry) -> Method:
    """Solver an entry names."""
    return cast(Method, entry.method)
