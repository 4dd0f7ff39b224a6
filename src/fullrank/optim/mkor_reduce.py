"""One all-reduce for the statistics of all layers: O(m + n) numbers a layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from fullrank.optim.mkor_layers import Layer


def world(group: dist.ProcessGroup | None) -> int:
    """Number of ranks whose statistics are averaged."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    return dist.get_world_size(group)


def mean_over_ranks(
    layers: Sequence[Layer], group: dist.ProcessGroup | None
) -> list[tuple[Layer, Tensor, Tensor, Tensor]]:
    """Average a and g over the ranks that used each layer.

    Returns
    -------
    list
        Layer, a, g, and a 0-d bool: whether any rank has used it. The same on all ranks.
    """
    parts: list[Tensor] = []
    for layer in layers:
        a, g = layer.means()
        parts += [a, g, a.new_tensor([float(layer.statistics.seen > 0)])]
    if not parts:
        return []
    # float64 statistics stay so; a mixture travels in the widest.
    dtype = torch.float32
    for part in parts:
        dtype = torch.promote_types(dtype, part.dtype)
    flat = torch.cat([part.to(parts[0].device, dtype) for part in parts])
    dist.all_reduce(flat, group=group)
    pieces = torch.split(flat, [len(part) for part in parts])
    found = []
    for i, layer in enumerate(layers):
        a, g, count = pieces[3 * i : 3 * i + 3]
        share = count.clamp_min(1.0)
        mean_a, mean_g = (a / share).to(parts[3 * i]), (g / share).to(parts[3 * i + 1])
        found.append((layer, mean_a, mean_g, count[0] > 0))
    return found


def mean_of(value: float, device: torch.device, group: dist.ProcessGroup | None) -> float:
    """Mean of a number over the ranks, so that all of them decide alike."""
    if world(group) == 1:
        return value
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, group=group)
    return float(shared.item()) / world(group)
