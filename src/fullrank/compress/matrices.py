"""How a module's weight is read as a matrix, and how a matrix is written back."""

from __future__ import annotations

from torch import nn

from fullrank.compress.matrices_conv import CONVOLUTIONS, matricise_conv
from fullrank.compress.matricised import Matricised as Matricised
from fullrank.compress.matricised import float_weight
from fullrank.core.errors import InputError


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``: a Linear whose weight is stored ``(in, out)``."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def matricise(module: nn.Module, scheme: str | None = None) -> Matricised:
    """Read a layer's weight as a matrix.

    Parameters
    ----------
    module
        ``nn.Linear``, transformers' ``Conv1D``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.
    scheme
        ``"linear"``, the only one of a linear layer; ``"channel"`` (by default), ``"spatial"`` or
        ``"decouple"`` of a convolution, see
        :func:`~fullrank.compress.matrices_conv.matricise_conv`.

    Raises
    ------
    InputError
        On a module without a weight of that kind, or a scheme that it is not read by.

    Examples
    --------
    >>> matricise(nn.Linear(3, 2)).matrix.shape, matricise(nn.Conv2d(3, 8, 5)).matrix.shape
    (torch.Size([2, 3]), torch.Size([8, 75]))
    """
    if isinstance(module, CONVOLUTIONS):
        return matricise_conv(module, scheme or "channel")
    if scheme not in (None, "linear"):
        raise InputError(f"a {type(module).__name__} is read by scheme 'linear', not {scheme!r}")
    if is_conv1d(module):
        return Matricised(float_weight(module).T, lambda matrix: matrix.T)
    if isinstance(module, nn.Linear):
        return Matricised(float_weight(module), lambda matrix: matrix)
    raise InputError(f"a {type(module).__name__} has no weight that is read as a matrix")
