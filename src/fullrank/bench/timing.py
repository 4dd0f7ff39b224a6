"""Times of several contestants that are comparable although the machine changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch

Stopwatch = Callable[[], float]
Step = Callable[[Stopwatch], tuple[float, ...]]
"""Makes one step; returns what its parts took, by the stopwatch."""


def stopwatch(device: torch.device) -> Stopwatch:
    """Return a clock in seconds: this process's CPU time, or wall time of a finished accelerator.

    CPU time leaves out what other processes do meanwhile.
    """
    if device.type == "cpu":
        return time.process_time

    def wall() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return wall


def interleaved_times(
    steps: Mapping[str, Step],
    clock: Stopwatch,
    *,
    cycle: int,
    cycles: int = 2,
    warmup: int = 20,
    turn: int = 20,
) -> dict[str, list[float]]:
    """Time contestants in turns of a few steps each.

    Parameters
    ----------
    steps
        One contestant's step each.
    clock
        Given to the steps.
    cycle
        Steps after which a contestant's work repeats, such as the choice of a subspace.
    cycles
        How many are timed.
    warmup
        Steps before that.
    turn
        Steps before it is the next one's turn.

    Returns
    -------
    dict
        Mean milliseconds of each part over a cycle; of each of its steps, the fastest over the
        cycles counts.

    Examples
    --------
    >>> ticks = iter(range(1000))
    >>> def step(clock):
    ...     return (clock() + 1 - clock() + 1,)
    >>> interleaved_times({"a": step}, lambda: float(next(ticks)), cycle=4, warmup=0)
    {'a': [1000.0]}
    """
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    left = warmup + cycle * cycles
    while left > 0:
        for name, step in steps.items():
            taken[name].extend(step(clock) for _ in range(min(turn, left)))
        left -= turn
    return {name: _means(times[warmup:], cycle) for name, times in taken.items()}


def _means(times: list[tuple[float, ...]], cycle: int) -> list[float]:
    """Mean over a cycle of the least time at each of its places, by part, in milliseconds."""
    found = torch.tensor(times, dtype=torch.float64).view(-1, cycle, len(times[0]))
    means: list[float] = (1e3 * found.amin(0).mean(0)).tolist()
    return means
