"""`make_plan`: from a rank rule and a model to a `RankPlan`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import numpy as np
import torch
from torch import nn

from fullrank.compress.calibration import CalibrationStats, LayerStats
from fullrank.compress.data_checks import leave_dense, nothing_to_go_by
from fullrank.compress.matrices import Matricised, matricise
from fullrank.compress.matrices_conv import CONVOLUTIONS, ConvScheme, scheme_for
from fullrank.compress.solvers import Decomposition, Method, decompose
from fullrank.compress.targets import Patterns, factorisable
from fullrank.core.errors import InputError
from fullrank.core.names import model_fingerprint
from fullrank.core.plan import PlanEntry, RankPlan, break_even
from fullrank.core.rank_rules import LayerSpectrum, ModelRule, RankRule, apply_rule
from fullrank.linalg import gram_spectrum
from fullrank.linalg.checks import all_finite

# Methods that look at nothing but the weight, or not even at that.
WITHOUT_DATA = ("svd", "snmf", "random")


def layer_spectra(
    model: nn.Module,
    *,
    include: Patterns | None = None,
    exclude: Patterns = (),
    stats: CalibrationStats | None = None,
    method: Method | None = None,
    scheme: ConvScheme = "channel",
) -> dict[str, LayerSpectrum]:
    """Singular values of every layer that could be factorised, most important first.

    With statistics they are of what the layer puts out on the calibration data (square roots of
    the method's losses), without of its weight. Layers that saw no calibration data, or nothing
    that varies, are left out; of the latter a warning tells.

    Parameters
    ----------
    model, include, exclude, scheme
        See :func:`make_plan`.
    stats
        What the model's layers saw.
    method
        ``"svd"`` without statistics and ``"output_pca"`` with them, unless told otherwise.
    """
    use = method or ("svd" if stats is None else "output_pca")
    spectra: dict[str, LayerSpectrum] = {}
    dense: dict[str, str] = {}
    for name, module in factorisable(model, include, exclude).items():
        found = _read(module, scheme, use)
        if use in WITHOUT_DATA:
            spectra[name] = _of_weight(name, found)
            continue
        layer = stats.get(name) if stats is not None else None
        if layer is None or not layer.serves(use) or found.stack > 1:
            continue
        if why := nothing_to_go_by(layer, use):
            dense[name] = why
            continue
        loss = solved(name, found, use, layer).loss.cpu().numpy()
        spectra[name] = LayerSpectrum(np.sqrt(loss)[: min(found.shape)], found.shape)
    leave_dense(dense, bool(spectra))
    return spectra


def solved(name: str, found: Matricised, method: Method, stats: LayerStats) -> Decomposition:
    """Decompose a layer's matrix; an error names the layer."""
    try:
        return decompose(found.matrix, method, stats)
    except InputError as error:
        raise InputError(f"{name}: {error}") from error


def _read(module: nn.Module, scheme: ConvScheme, method: str) -> Matricised:
    if not isinstance(module, CONVOLUTIONS):
        return matricise(module)
    if method not in WITHOUT_DATA and scheme != "channel":
        raise InputError(f"method {method!r} reads convolutions by 'channel', not {scheme!r}")
    return matricise(module, scheme_for(module, scheme))


def _of_weight(name: str, found: Matricised) -> LayerSpectrum:
    if not all_finite(found.matrix):
        raise InputError(f"{name}: the weight holds NaN or infinite values")
    each = [gram_spectrum(matrix) for matrix in found.matrix.reshape(-1, *found.shape)]
    values = torch.stack(each).square().sum(0).sqrt().cpu().numpy()
    eps = torch.finfo(found.matrix.dtype).eps
    return LayerSpectrum(values, found.shape, found.stack, eps)


def make_plan(
    model: nn.Module,
    rule: RankRule | ModelRule,
    include: Patterns | None = None,
    exclude: Patterns = (),
    stats: CalibrationStats | None = None,
    *,
    method: Method | None = None,
    spectra: Mapping[str, LayerSpectrum] | None = None,
    scheme: ConvScheme = "channel",
) -> RankPlan:
    """Decide how much rank each layer gets; nothing in the model changes.

    Parameters
    ----------
    model
        Any module with ``nn.Linear``, transformers' ``Conv1D`` or convolutional layers.
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
    scheme
        How convolutions are split: ``"channel"``, ``"spatial"`` or ``"decouple"`` (see
        :class:`~fullrank.compress.LowRankConv2d`). One that is not split so (in groups, or of
        one or three dimensions spatially) is split channel-wise.

    Returns
    -------
    RankPlan
        For the purpose ``"factor"``. A layer whose factors would not be smaller than its weight
        stays dense, and its entry says so.

    Raises
    ------
    InputError
        When a pattern matches nothing, a weight is not finite, a rule gives a rank that is
        out of range, or the method does not go with the scheme.

    Examples
    --------
    >>> from fullrank.core.rank_rules import FractionOfBreakEven
    >>> plan = make_plan(nn.Sequential(nn.Linear(16, 16)), FractionOfBreakEven(0.5))
    >>> plan["0"].rank
    4
    """
    use = method or ("svd" if stats is None else "output_pca")
    if spectra is None:
        spectra = layer_spectra(
            model, include=include, exclude=exclude, stats=stats, method=use, scheme=scheme
        )
    ranks = apply_rule(rule, spectra)
    entries = {}
    for name, module in factorisable(model, include, exclude).items():
        found = _read(module, scheme, use)
        how = (use, repr(rule), found.scheme, found.stack)
        if name in spectra:
            entries[name] = entry_for(found.shape, ranks[name], *how)
            continue
        entry = entry_for(found.shape, None, *how)
        layer = stats.get(name) if stats is not None else None
        why = "the model did not use it on the data"
        if layer is not None and layer.serves(use):
            why = nothing_to_go_by(layer, use) or why
        if found.stack > 1:
            why = f"a convolution in groups is not factorised by {use!r}"
        entries[name] = replace(entry, reason=why)
    return RankPlan(
        entries,
        source="weight" if use in WITHOUT_DATA else "activation",
        fingerprint=model_fingerprint(model),
    )


def entry_for(
    shape: tuple[int, int],
    rank: int | None,
    method: str,
    reason: str,
    scheme: str = "linear",
    stack: int = 1,
) -> PlanEntry:
    """Plan one layer, read as ``stack`` matrices of a shape; dense if factors are not smaller."""
    options = {"stack": stack} if stack > 1 else {}
    whole = (stack * shape[0], shape[1])
    if rank is None:
        return PlanEntry(whole, None, method, scheme, f"{reason}: left dense", options)
    if rank > break_even(*shape):
        why = f"{reason}: rank {rank} saves nothing (break-even is {break_even(*shape)})"
        return PlanEntry(whole, None, method, scheme, why, options)
    return PlanEntry(whole, rank, method, scheme, reason, options)


def plan_method(entry: PlanEntry) -> Method:
    """Solver an entry names."""
    return cast(Method, entry.method)
