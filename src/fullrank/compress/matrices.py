"""How a module's weight is read as a matrix, and how a matrix is written back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fullrank.core.errors import InputError


@dataclass(frozen=True)
class Matricised:
    """A weight as an ``(out, in)`` matrix.

    Attributes
    ----------
    matrix
        ``(m, n)``; a view of the module's weight where that is possible.
    fold
        Turns an ``(m, n)`` matrix back into the shape of the weight.
    """

    matrix: Tensor
    fold: Callable[[Tensor], Tensor]


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``: a Linear whose weight is stored ``(in, out)``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def matricise(module: nn.Module, scheme: str = "linear") -> Matricised:
    """Read a layer's weight as a matrix.

    Parameters
    ----------
    module
        ``nn.Linear`` or transformers' ``Conv1D``.
    scheme
        ``"linear"``; convolutions will add theirs.

    Raises
    ------
    InputError
        On a module without a weight of that kind, or an unknown scheme.

    Examples
    --------
    >>> matricise(nn.Linear(3, 2)).matrix.shape
    torch.Size([2, 3])
    """
    if scheme != "linear":
        raise InputError(f"scheme {scheme!r} is not known; layers are read by 'linear'")
    if is_conv1d(module):
        return Matricised(_weight(module).T, lambda matrix: matrix.T)
    if isinstance(module, nn.Linear):
        return Matricised(_weight(module), lambda matrix: matrix)
    raise InputError(f"a {type(module).__name__} has no weight that is read as a matrix")


def _weight(module: nn.Module) -> Tensor:
    weight = module.weight
    assert isinstance(weight, Tensor)
    if not weight.is_floating_point():
        raise InputError(f"the weight is of {weight.dtype} (quantised?); factors need floats")
    return weight.detach()
