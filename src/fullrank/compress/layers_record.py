"""The factorised layers of a model: which they are, as files record them, and built from that."""

from __future__ import annotations

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


def describe(model: nn.Module) -> dict[str, dict[str, Any]]:
    """List the factorised layers of a model as files record them (JSON values only)."""
    records = {}
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
    return records


def record_format(records: Mapping[str, Mapping[str, Any]]) -> int:
    """Version of the record that these layers need: convolutions came with the second."""
    return 2 if any("scheme" in record for record in records.values()) else 1


def stands_for(record: Mapping[str, Any], module: nn.Module | None) -> bool:
    """Whether a record is of a layer that could stand in this module's place."""
    shape = getattr(getattr(module, "weight", None), "shape", None)
    if shape is None or isinstance(module, CONVOLUTIONS) != ("scheme" in record):
        return False
    if "scheme" in record:
        return bool(list(shape) == record["shape"])
    # A linear layer's shape is recorded as (out, in), however its weight is stored.
    return sorted(shape) == sorted(record["shape"])


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
