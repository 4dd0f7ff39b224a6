"""The layers of a model that its architecture has not: as files record them, and built from that.

These are the factorised ones, and dense ones with a bias that factorising added.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from fullrank.compress.layers import LowRankLinear
from fullrank.compress.layers_conv import LowRankConv
from fullrank.compress.matrices import is_conv1d
from fullrank.compress.matrices_conv import CONVOLUTIONS
from fullrank.core.names import canonical_modules

Factorised = LowRankLinear | LowRankConv


def factorised(model: nn.Module) -> Iterator[tuple[str, Factorised]]:
    """Yield ``(canonical name, layer)`` of every factorised layer, shared ones once."""
    for name, module in canonical_modules(model):
        if isinstance(module, Factorised):
            yield name, module


def added_biases(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(canonical name, layer)`` of layers, dense or not, with a bias that was added."""
    for name, module in canonical_modules(model):
        if getattr(module, "bias_added", False) and module.bias is not None:
            yield name, module


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """List a model's layers as files record them (JSON values only); dense ones have no rank."""
    records: dict[str, dict[str, Any]] = {}
    for name, layer in factorised(model):
        records[name] = {
            "shape": list(layer.weight_shape),
            "rank": layer.rank,
            "bias": layer.bias is not None,
            "method": layer.method,
            "error": layer.error,
        }
        if isinstance(layer, LowRankConv):
            records[name]["scheme"] = layer.scheme
    for name, dense in added_biases(model):
        if name not in records:
            records[name] = {"shape": list(dense.get_parameter("weight").shape), "rank": None}
            records[name]["bias"] = True
    return records


def record_format(records: Mapping[str, Mapping[str, Any]]) -> int:
    """Version of the record that these layers need.

    Convolutions came with the second, dense layers with the third.
    """
    if any(record["rank"] is None for record in records.values()):
        return 3
    return 2 if any("scheme" in record for record in records.values()) else 1


def stands_for(record: Mapping[str, Any], module: nn.Module | None) -> bool:
    """Whether a record is of a layer that could stand in this module's place."""
    shape = getattr(getattr(module, "weight", None), "shape", None)
    if shape is not None and record["rank"] is None:
        return bool(list(shape) == record["shape"])
    if shape is None or isinstance(module, CONVOLUTIONS) != ("scheme" in record):
        return False
    if "scheme" in record:
        return bool(list(shape) == record["shape"])
    # A linear layer's shape is recorded as (out, in), however its weight is stored.
    return sorted(shape) == sorted(record["shape"])


def layer_for(module: nn.Module, record: Mapping[str, Any]) -> nn.Module:
    """Build a layer from its record, in the place of ``module``; its numbers are still to load."""
    if record["rank"] is not None:
        return shell_for(module, record)
    dense = copy.deepcopy(module)
    weight = dense.get_parameter("weight")
    dense.bias = nn.Parameter(weight.new_zeros(record["shape"][0]), weight.requires_grad)
    dense.__dict__["bias_added"] = True
    return dense


def shell_for(module: nn.Module, record: Mapping[str, Any], *, drawn: bool = True) -> Factorised:
    """Build a factorised layer from its record, in the place of ``module``.

    Its factors are drawn at random, unless they will be written at once (``drawn=False``).
    """
    layer: Factorised
    if "scheme" in record:
        layer = LowRankConv.like(module, record["rank"], record["scheme"], record["bias"])
    else:
        layer = _linear_shell(module, record, drawn)
    layer.method, layer.error = record.get("method", ""), record.get("error")
    without = getattr(module, "bias", None) is None or getattr(module, "bias_added", False)
    layer.bias_added = layer.bias is not None and without
    return layer


def _linear_shell(module: nn.Module, record: Mapping[str, Any], drawn: bool) -> LowRankLinear:
    m, n = record["shape"]
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    layer = LowRankLinear(
        n,
        m,
        record["rank"],
        record["bias"],
        device=weight.device if drawn else "meta",
        dtype=weight.dtype,
        transposed=is_conv1d(module),
    )
    if not drawn:
        layer.to_empty(device=weight.device)
    return layer.requires_grad_(weight.requires_grad).train(module.training)
