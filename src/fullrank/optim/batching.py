"""What is stepped by one call: things that are alike, a bounded number of elements at a time."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fullrank.optim.foundation import State

# What is alive beside the state stays bounded, and on a CPU the elementwise work finds its
# operands in the cache. Accelerators want fewer, larger launches.
_ELEMENTS = {"cpu": 1 << 18}
_ELEMENTS_ELSEWHERE = 1 << 24

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def batches(
    items: Iterable[T], key: Callable[[T], tuple[K, torch.device]], size: Callable[[T], int]
) -> Iterator[tuple[K, list[T]]]:
    """Put items together that agree in a key and in their device.

    Parameters
    ----------
    items
        What is to be stepped.
    key
        Item -> (what it must have in common with the others, the device it is on).
    size
        Item -> its elements. A batch that has enough for its device is closed.

    Yields
    ------
    tuple
        A key, and the items that have it.

    Examples
    --------
    >>> cpu = torch.device("cpu")
    >>> for parity, numbers in batches(range(5), lambda i: (i % 2, cpu), lambda i: 1):
    ...     print(parity, numbers)
    0 [0, 2, 4]
    1 [1, 3]
    """
    open_: dict[tuple[K, torch.device], tuple[list[T], int]] = {}
    for item in items:
        name, device = both = key(item)
        batch, elements = open_.get(both, ([], 0))
        batch.append(item)
        elements += size(item)
        open_[both] = (batch, elements)
        if elements >= _ELEMENTS.get(device.type, _ELEMENTS_ELSEWHERE):
            del open_[both]
            yield name, batch
    for (name, _), (batch, _) in open_.items():
        yield name, batch


def known_age(state: State) -> float:
    """Steps that moments have seen, where the host knows how many were skipped."""
    age: Any = state["step"].item() - state["unseen"].item()
    return float(age)


def device_ages(states: Sequence[State]) -> Tensor:
    """The same, one element a state, where only their device knows."""
    unseen = torch.stack([state["unseen"] for state in states])
    steps = [state["step"].item() for state in states]
    if len(set(steps)) == 1:
        return unseen.neg().add_(steps[0])
    return torch.tensor(steps).to(unseen.device, non_blocking=True) - unseen
