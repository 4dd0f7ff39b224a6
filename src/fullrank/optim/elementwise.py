"""Adam on whole arrays, for optimizers that do something else with some of their parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fullrank.optim.batching import batches, device_ages, known_age
from fullrank.optim.foundation import State
from fullrank.optim.inner import AdamW, Batch


@dataclass(slots=True)
class Array:
    """What is stepped: an array, its gradient, and the moments and counters that go with it."""

    weight: Tensor
    grad: Tensor
    state: State


def alike(
    arrays: Iterable[Array], device_knows: Callable[[Tensor], bool]
) -> Iterator[tuple[float | Tensor, list[Array]]]:
    """Arrays of a group that one call can step, with their age (one number, or one each).

    Of the same device and dtypes, and a bounded number of elements.
    """

    def kind(array: Array) -> tuple[tuple[Any, ...], torch.device]:
        age = None if device_knows(array.weight) else known_age(array.state)
        return (array.weight.dtype, array.grad.dtype, age), array.weight.device

    for (_, _, age), chunk in batches(arrays, kind, lambda array: array.grad.numel()):
        yield device_ages([array.state for array in chunk]) if age is None else age, chunk


def adamw_step(
    group: dict[str, Any],
    arrays: list[Array],
    inner: AdamW,
    age: float | Tensor,
    skip: Tensor | None,
    *,
    keep: float,
    decay_first: bool,
) -> None:
    """Step arrays in place: ``W <- keep W - s N``, or ``keep (W - s N)``.

    Parameters
    ----------
    group
        ``lr``, ``betas``, ``eps``.
    arrays
        Of one device and dtype.
    inner
        Adam, with eps where the method has it.
    age
        Steps that the moments have seen, this one included.
    skip
        None, or a bool scalar on the device: where True nothing changes.
    keep
        What decoupled decay leaves of the weight: ``1 - lr weight_decay``.
    decay_first
        Whether the weight decays before the update (``torch.optim.AdamW``) or after it.
    """
    batch = Batch(
        group=group,
        age=age,
        weights=[array.weight for array in arrays],
        small=[array.grad for array in arrays],
        states=[array.state for array in arrays],
        skip=skip,
    )
    if inner.dense(batch, alpha=1.0 if decay_first else keep, beta=keep):
        return
    size = fill_directions(batch, inner)
    sizes: Sequence[Any] = size.unbind() if isinstance(size, Tensor) else [size] * len(arrays)
    for weight, direction, each in zip(batch.weights, batch.direction, sizes, strict=True):
        step = direction * each
        if decay_first:
            decay(weight, keep, skip).sub_(step)
        else:
            decay(weight.sub_(step), keep, skip)


def decay(weight: Tensor, keep: float, skip: Tensor | None) -> Tensor:
    """Multiply a weight by ``keep`` in place, unless the device knows that the step is skipped."""
    if keep == 1.0:
        return weight
    if skip is None:
        return weight.mul_(keep)
    factor = torch.full((), keep, dtype=weight.dtype, device=weight.device)
    return weight.mul_(torch.where(skip, 1.0, factor))


def fill_directions(batch: Batch, inner: AdamW) -> float | Tensor:
    """Update moments of any floating-point dtype, fill ``batch.direction``, return the step size.

    The arithmetic is in the gradients' dtype, float32 at least.
    """
    dtype = torch.promote_types(batch.small[0].dtype, torch.float32)
    batch.small = [small.to(dtype).contiguous() for small in batch.small]
    batch.direction = [torch.empty_like(small) for small in batch.small]
    kept = batch.states
    batch.states = [
        {name: moment.to(dtype) for name, moment in state.items() if name.startswith("exp_avg")}
        for state in kept
    ]
    size = inner.direction(batch)
    for state, worked in zip(kept, batch.states, strict=True):
        for name, moment in worked.items():
            if state[name] is not moment:
                state[name].copy_(moment)
    batch.states = kept
    return size
