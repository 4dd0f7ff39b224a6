"""From a dense layer and what a plan says about it to the factorised layer in its place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.compress.calibration import LayerStats
from fullrank.compress.conv_split import split_conv, write_factors
from fullrank.compress.layers_conv import LowRankConv
from fullrank.compress.layers_record import Factorised, shell_for
from fullrank.compress.matrices import matricise
from fullrank.compress.matrices_conv import CONVOLUTIONS
from fullrank.compress.planning import WITHOUT_DATA, plan_method
from fullrank.compress.solvers import (
    Balance,
    Decomposition,
    Factors,
    default_balance,
    split,
    svd_factors,
)
from fullrank.core.errors import InputError
from fullrank.core.plan import PlanEntry


@torch.no_grad()
def build_layer(
    module: nn.Module,
    entry: PlanEntry,
    stats: LayerStats | None = None,
    balance: Balance | None = None,
) -> Factorised:
    """Build the layer that stands for a linear or convolutional one under a plan.

    Parameters
    ----------
    module
        It is not changed.
    entry
        Rank, method and scheme; the method ``"random"`` draws new factors and keeps the bias.
    stats
        What the layer saw, for the methods that need it.
    balance
        See :func:`~fullrank.compress.split`.

    Raises
    ------
    InputError
        When the entry has no rank, its method does not go with its scheme, or the solver
        refuses.

    Examples
    --------
    >>> entry = PlanEntry((8, 36), 4, scheme="channel")
    >>> build_layer(nn.Conv2d(4, 8, 3), entry)
    LowRankConv2d(4, 8, kernel_size=(3, 3), rank=4, scheme='channel', stride=(1, 1), bias=True)
    """
    check_method(module, entry)
    assert entry.rank is not None
    if entry.method == "random":
        layer = shell(module, entry)
        _write_bias(layer, module, None)
        return layer
    if isinstance(module, CONVOLUTIONS) and entry.method == "svd":
        return split_conv(module, entry.rank, entry.scheme, balance)
    use = balance or default_balance(entry.method)
    found = matricise(module, entry.scheme)
    if entry.method == "svd" and stats is None:
        return _layer_of(module, entry, svd_factors(found.matrix, entry.rank, use))
    parts = [
        split(matrix, entry.rank, plan_method(entry), use, stats)
        for matrix in found.matrix.reshape(-1, *found.shape)
    ]
    return _layer_of(module, entry, _stacked(parts, found.matrix))


@torch.no_grad()
def factorised_layer(
    module: nn.Module,
    entry: PlanEntry,
    solved: Decomposition,
    balance: Balance | None = None,
) -> Factorised:
    """Build the layer that stands for ``module`` from a decomposition made before."""
    assert entry.rank is not None
    factors = solved.truncate(entry.rank, balance or default_balance(entry.method))
    return _layer_of(module, entry, factors)


def shell(
    module: nn.Module, entry: PlanEntry, bias: bool | None = None, *, drawn: bool = True
) -> Factorised:
    """Build a layer of the shapes that an entry says, its factors drawn anew or still to write."""
    if bias is None:
        bias = entry.method not in WITHOUT_DATA or getattr(module, "bias", None) is not None
    record = {"shape": entry.shape, "rank": entry.rank, "bias": bias, "method": entry.method}
    if isinstance(module, CONVOLUTIONS):
        record["scheme"] = entry.scheme
    return shell_for(module, record, drawn=drawn)


def check_method(module: nn.Module, entry: PlanEntry) -> None:
    """Raise :class:`InputError` when an entry asks for what its method cannot do."""
    if entry.rank is None:
        raise InputError("the plan leaves this layer dense")
    if not isinstance(module, CONVOLUTIONS) or entry.method in ("svd", "random"):
        return
    if entry.scheme != "channel":
        raise InputError(
            f"method {entry.method!r} reads a convolution by scheme 'channel', not {entry.scheme!r}"
        )
    if module.groups > 1 and entry.method not in WITHOUT_DATA:
        raise InputError(
            f"a convolution in {module.groups} groups is factorised by its weight alone, not by "
            f"{entry.method!r}"
        )


def _stacked(parts: list[Factors], matrix: Tensor) -> Factors:
    if len(parts) == 1:
        return parts[0]
    squares = matrix.double().square().sum((-2, -1)).cpu()
    lost = squares @ torch.tensor([part.error for part in parts], dtype=torch.float64)
    return Factors(
        torch.stack([part.first for part in parts]),
        torch.stack([part.second for part in parts]),
        None,
        float(lost / squares.sum().clamp_min(1e-300)),
    )


def _layer_of(module: nn.Module, entry: PlanEntry, factors: Factors) -> Factorised:
    has_bias = getattr(module, "bias", None) is not None or factors.bias_shift is not None
    layer = shell(module, entry, bias=has_bias, drawn=False)
    if isinstance(layer, LowRankConv):
        write_factors(layer, factors.first, factors.second)
    else:
        layer.first.copy_(factors.first)
        layer.second.copy_(factors.second)
    _write_bias(layer, module, factors.bias_shift)
    layer.error = factors.error
    return layer


def _write_bias(layer: Factorised, module: nn.Module, shift: Tensor | None) -> None:
    """Give the layer the dense one's bias, moved by what the factors' inputs have in common."""
    if layer.bias is None:
        return
    old = module.bias if isinstance(module.bias, Tensor) else None
    wide = layer.bias.double().zero_() if old is None else old.double()
    layer.bias.copy_(wide if shift is None else wide + shift.to(wide))
