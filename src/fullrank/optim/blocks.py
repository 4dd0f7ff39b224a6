"""Which weight tensors of a group have optimizer state in which period (FRUGAL's blocks)."""

from __future__ import annotations

from typing import Literal

import torch

from fullrank.core.errors import InputError
from fullrank.optim.seeds import generator_for

BlockOrder = Literal["random", "ascending", "descending", "mirror"]


def active_blocks(
    order: BlockOrder, count: int, active: int, period: int, *seed: int
) -> frozenset[int]:
    """Indices of the active tensors; a function of the period, so that nothing else is saved.

    Parameters
    ----------
    order
        ``"ascending"`` and ``"descending"`` move on by ``active`` tensors every period, from the
        first or the last, and wrap; ``"mirror"`` takes half of them from each end, moving inwards;
        ``"random"`` draws anew.
    count
        Tensors of the group.
    active
        How many of them have state.
    period
        Counted from 1.
    seed
        What a draw depends on beside the period.

    Examples
    --------
    >>> [sorted(active_blocks("descending", 5, 2, period)) for period in (1, 2, 3)]
    [[3, 4], [1, 2], [0, 4]]
    """
    turn = period - 1
    if order == "random":
        drawn = torch.randperm(count, generator=generator_for(*seed, period))
        return frozenset(drawn[:active].tolist())
    if order == "ascending":
        return frozenset((turn * active + i) % count for i in range(active))
    if order == "descending":
        return frozenset((count - 1 - turn * active - i) % count for i in range(active))
    half, middle = active // 2, count // 2
    low = [(turn * half + i) % middle for i in range(half)]
    return frozenset([*low, *(count - 1 - i for i in low)])


def check_blocks(order: BlockOrder, active: int) -> None:
    """A mirror needs as many from either end.

    >>> check_blocks("mirror", 3)
    Traceback (most recent call last):
        ...
    fullrank.core.errors.InputError: block_order='mirror' takes half of its 3 active tensors from...
    """
    if order == "mirror" and active % 2:
        raise InputError(
            f"block_order='mirror' takes half of its {active} active tensors from each end, which "
            "must be an even number; change density, or the order"
        )
