"""What an inner update works on, and what it must be able to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from fullrank.optim.foundation import Spec, State


@dataclass(slots=True)
class Batch:
    """Matrices that are stepped together: same device, same moments' dtype, same age.

    Attributes
    ----------
    group
        The param group: learning rate and the rest.
    age
        Steps that the moments have seen, this one included: one number for all, or one element a
        matrix on the device where the host does not know it.
    weights
        The ``(m, n)`` views of the weights.
    small
        What ``down`` gave. Inner updates do not write to it.
    direction
        Where the inner update writes; shapes of ``small``, the moments' dtype.
    states
        The optimizer's state of each matrix.
    skip
        None, or a bool scalar on the device: True leaves every moment as it is.
    lr
        The learning rate that decoupled decay uses, where an inner update changes it by matrix.
    """

    group: dict[str, Any]
    age: float | Tensor
    weights: list[Tensor] = field(default_factory=list)
    small: list[Tensor] = field(default_factory=list)
    direction: list[Tensor] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    skip: Tensor | None = None
    lr: list[float | Tensor] | None = None

    def ages(self) -> Sequence[float | Tensor]:
        """One age a matrix; at least 1, where corrections for the age are defined."""
        if not isinstance(self.age, Tensor):
            return [self.age] * len(self.small)
        # A matrix that never had a good step has age 0.
        return self.age.to(self.states_dtype).clamp_min(1.0).unbind()

    @property
    def states_dtype(self) -> torch.dtype:
        """Dtype of the arithmetic."""
        return (self.direction or self.weights)[0].dtype

    def clean(self) -> list[Tensor]:
        """Return ``small``; zeros where the step is skipped, so that no NaN gets into moments."""
        if self.skip is None:
            return self.small
        return [torch.where(self.skip, 0.0, small) for small in self.small]

    def silence(self) -> None:
        """Make every direction 0 where the step is skipped."""
        if self.skip is not None:
            for direction in self.direction:
                direction.copy_(torch.where(self.skip, 0.0, direction))

    def unless(self, weight: float | Tensor, like: Tensor) -> float | Tensor:
        """How much of the new value an average takes: nothing where the step is skipped."""
        if self.skip is None:
            return weight
        # A number would have to be brought to the device, and waited for: a product takes it along.
        return (~self.skip).to(like.dtype) * weight


class InnerUpdate(Protocol):
    """A stateful rule on small arrays."""

    entrywise: bool
    """Whether each number is stepped by itself, so that parts of an array can be, too."""

    def expected(self, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
        """Shape and dtype of each state tensor for a small array of this shape."""
        ...

    def direction(self, batch: Batch) -> float | Tensor:
        """Update the moments, write each direction N, return s: the step is ``-s * up(N)``."""
        ...

    def dense(self, batch: Batch, alpha: float, beta: float) -> bool:
        """Do ``W <- beta W - alpha s N`` in one pass over everything, if this rule can.

        ``batch.small`` are then the gradients themselves; a skip is heeded. False means that
        nothing was done.
        """
        ...

    def reset(self, state: State) -> None:
        """Zero the moments of one matrix."""
        ...

    def on_first_moment(self, state: State, change: Callable[[Tensor], None]) -> None:
        """Let ``change`` edit the first moment of one matrix in place."""
        ...
