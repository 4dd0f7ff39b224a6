"""Which matrices are stepped together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.optim.foundation import State
from fullrank.optim.matrices import Slot

# Small arrays are worked on a few matrices at a time: what is alive beside the state stays
# bounded, and on a CPU the elementwise work finds its operands in the cache. Accelerators want
# fewer, larger launches.
_CHUNK = {"cpu": 1 << 18}
_CHUNK_ELSEWHERE = 1 << 24


@dataclass(slots=True)
class Member:
    """One parameter in one step, as matrices (or whole, where it is not projected)."""

    slot: Slot
    weight: Tensor
    grad: Tensor
    state: State
    due: bool = False
    restarts: bool = False
    given: Any = None
    radial: Tensor | None = None


def chunks(
    members: Iterable[Member], device_knows: Callable[[Tensor], bool]
) -> Iterator[tuple[float | None, list[Member]]]:
    """Matrices that can be stepped together, a bounded number of small elements at a time.

    Yields their age with them, or None where only the device knows it.
    """
    open_: dict[tuple[Any, ...], tuple[list[Member], int]] = {}
    for member in members:
        slot, state = member.slot, member.state
        age = None
        if not device_knows(slot.param):
            age = 1.0 if member.restarts else state["step"].item() - state["unseen"].item()
        device = member.weight.device
        key = (id(slot.group), device, slot.moments_dtype, type(slot.subspace), age)
        chunk, size = open_.get(key, ([], 0))
        chunk.append(member)
        size += slot.small_size
        open_[key] = (chunk, size)
        if size >= _CHUNK.get(device.type, _CHUNK_ELSEWHERE):
            del open_[key]
            yield age, chunk
    for key, (chunk, _) in open_.items():
        yield key[-1], chunk


def device_ages(members: list[Member]) -> Tensor:
    """One age a matrix, on their device."""
    unseen = torch.stack([m.state["unseen"] for m in members])
    steps = [m.state["step"].item() for m in members]
    if len(set(steps)) == 1:
        return unseen.neg().add_(steps[0])
    return torch.tensor(steps, device=unseen.device) - unseen
