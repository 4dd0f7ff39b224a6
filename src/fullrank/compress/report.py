"""What factorisation did to each layer of a model."""

from __future__ import annotations

import math

from torch import nn

from fullrank.compress.layers import LowRankLinear
from fullrank.compress.layers_record import Factorised, factorised
from fullrank.core.table import Cell, Table


def report(model: nn.Module) -> Table:
    """Tell what factorisation did to each layer of a model.

    Columns: the rank; numbers in the dense weight and in the factors, without biases, and their
    ratio; how the factors were made; their relative squared error, of the layer's outputs on the
    calibration data where there was some, else of its weight; floating-point operations at each
    place of the layer's output (a token, a pixel; the margins of a convolution apart), before
    and after.

    Examples
    --------
    >>> from fullrank.compress import RankPlan, factorize
    >>> from fullrank.core.plan import PlanEntry
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> _ = factorize(model, RankPlan({"0": PlanEntry((16, 16), 2)}))
    >>> report(model).rows[0][:4]
    ['0', 2, 256, 64]
    """
    rows: list[list[Cell]] = []
    for name, layer in factorised(model):
        dense, kept = sizes(layer)
        error = None if layer.error is None else float(layer.error)
        row: list[Cell] = [name, layer.rank, dense, kept, kept / dense, layer.method, error]
        rows.append([*row, 2 * dense, 2 * _multiplications(layer)])
    columns = ["layer", "rank", "dense", "factors", "kept", "method", "relative error"]
    counts = dict.fromkeys(("dense", "factors", "FLOPs dense", "FLOPs"), ",d")
    return Table(
        [*columns, "FLOPs dense", "FLOPs"],
        rows,
        title="Factorised layers",
        formats={**counts, "kept": ".1%", "relative error": ".2%"},
    )


def sizes(layer: Factorised) -> tuple[int, int]:
    """Numbers in the dense weight that a layer stands for, and in its factors."""
    return math.prod(layer.weight_shape), layer.first.numel() + layer.second.numel()


def _multiplications(layer: Factorised) -> int:
    """Multiplications for one place of the output."""
    places = 1
    if not isinstance(layer, LowRankLinear):
        # The stride that the first convolution leaves to the second costs it more places.
        left = {"channel": (), "spatial": layer.stride[1:], "decouple": layer.stride}
        places = math.prod(left[layer.scheme])
    return places * layer.first.numel() + layer.second.numel()
