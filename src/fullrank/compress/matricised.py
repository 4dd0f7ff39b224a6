"""A weight read as a matrix, or as a stack of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fullrank.core.errors import InputError


@dataclass(frozen=True)
class Matricised:
    """A weight as an ``(out, in)`` matrix, or a stack of matrices that are factored alike.

    Attributes
    ----------
    matrix
        ``(m, n)`` or ``(stack, m, n)``; a view of the module's weight where that is possible.
    fold
        Turns a tensor of that shape back into the shape of the weight.
    scheme
        How the weight was read: ``"linear"``, or a convolution's scheme.
    """

    matrix: Tensor
    fold: Callable[[Tensor], Tensor]
    scheme: str = "linear"

    def __iter__(self) -> Iterator[Any]:
        """Let ``matrix, fold = matricise(layer)`` be written."""
        return iter((self.matrix, self.fold))

    @property
    def shape(self) -> tuple[int, int]:
        """``(m, n)`` of each matrix."""
        m, n = self.matrix.shape[-2:]
        return m, n

    @property
    def stack(self) -> int:
        """Number of matrices: 1, or a convolution's groups or filters."""
        return math.prod(self.matrix.shape[:-2])


def float_weight(module: nn.Module) -> Tensor:
    """Return a layer's weight, detached, if factors can be made of it."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise InputError(f"the weight is of {weight.dtype} (quantised?); factors need floats")
    return weight.detach()
