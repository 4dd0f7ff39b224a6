"""Seeds that are computed, not drawn: a resumed run, and every process, finds the same ones.

No generator is kept. What a random draw depends on (the optimizer's seed, the place of the weight,
its number of steps) is in the saved state anyway, so that a draw is a function of the state.
"""

from __future__ import annotations

import torch

from fullrank.core.errors import InputError
from fullrank.optim.checks import is_whole

_MASK = (1 << 64) - 1


def seed_of(source: torch.Generator | int | None) -> int:
    """Return an optimizer's seed: a number, one drawn from a generator, or 0.

    >>> seed_of(None), seed_of(7)
    (0, 7)
    """
    if isinstance(source, torch.Generator):
        return int(torch.randint(1 << 62, (), generator=source, device=source.device).item())
    if source is None:
        return 0
    if not is_whole(source):
        raise InputError(f"generator={source!r}; it is a torch.Generator, a seed, or None")
    return int(source)


def mixed(*parts: int) -> int:
    """Hash whole numbers into one of 63 bits (splitmix64).

    >>> mixed(0, 1) != mixed(1, 0)
    True
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state + (part & _MASK) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def generator_for(*parts: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a fresh generator that depends on these numbers alone."""
    return torch.Generator(device=device).manual_seed(mixed(*parts))
