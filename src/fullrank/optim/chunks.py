"""Which matrices are stepped together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.optim.batching import batches, known_age
from fullrank.optim.foundation import State
from fullrank.optim.matrices import Slot


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

    def alike(member: Member) -> tuple[tuple[Any, ...], torch.device]:
        slot, age = member.slot, None
        if not device_knows(slot.param):
            age = 1.0 if member.restarts else known_age(member.state)
        rewrites = slot.reparam is not None
        kind = id(slot.group), slot.moments_dtype, type(slot.subspace), rewrites, age
        return kind, member.weight.device

    for key, chunk in batches(members, alike, lambda member: member.slot.small_size):
        yield key[-1], chunk
