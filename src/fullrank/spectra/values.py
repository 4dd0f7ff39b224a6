"""From what a caller has (matrix, batch of matrices, singular values) to singular values."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.linalg.checks import all_finite

Input = Literal["matrix", "singular_values"]


def as_tensor(x: Any, what: str, *, finite: bool = True) -> Tensor:
    """Return a detached tensor of a real floating-point dtype, or say why there is none.

    Lists of numbers and numpy arrays of floats will do; integers are refused, since an integer
    matrix is more often a mistake (token ids, labels) than a matrix. ``finite=False`` leaves it to
    the caller to look for NaN and infinity, where some rows do not count.
    """
    if isinstance(x, Tensor):
        tensor = x.detach()
    else:
        array = np.asarray(x)
        if isinstance(x, (list, tuple)) and array.dtype.kind in "iu":
            array = array.astype(np.float64)
        if array.dtype.kind not in "f":
            raise InputError(f"{what} of dtype {array.dtype}: expected real floating-point numbers")
        tensor = torch.from_numpy(np.ascontiguousarray(array))
    if not tensor.is_floating_point():
        raise InputError(f"{what} of {tensor.dtype}: expected a real floating-point dtype")
    if tensor.numel() == 0:
        raise InputError(f"{what} of shape {tuple(tensor.shape)} is empty")
    if finite and not all_finite(tensor):
        raise InputError(f"{what} holds NaN or infinite values")
    return tensor


def to_double(tensor: Tensor) -> Tensor:
    """float64, on the CPU where the device has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def singular_values(
    x: Any, input: Input = "matrix", center: bool = False, mask: Any = None
) -> Tensor:
    """Singular values ``(..., k)``, float64, descending.

    Parameters
    ----------
    x
        ``(..., N, K)`` matrices, or ``(..., k)`` singular values in any order.
    input
        Which of the two.
    center
        Subtract the mean row first.
    mask
        ``(..., N)``, False for rows to leave out (padding).
    """
    if input == "singular_values":
        if center or mask is not None:
            raise InputError("center and mask need a matrix; these are singular values")
        given = to_double(as_tensor(x, "the list of singular values"))
        if given.ndim < 1:
            raise InputError("singular values come as a vector, not as one number")
        if (given < 0).any():
            raise InputError(f"a singular value is {float(given.min())}; none is negative")
        return given.sort(-1, descending=True).values
    if input != "matrix":
        raise InputError(f"input={input!r}; it is 'matrix' or 'singular_values'")
    tensor = as_tensor(x, "the matrix", finite=mask is None)
    if tensor.ndim < 2:
        raise InputError(
            f"a matrix has two dimensions (samples, features), not shape {tuple(tensor.shape)}; "
            "for a vector of singular values say input='singular_values'"
        )
    Z = to_double(tensor)
    if center or mask is not None:
        Z = _masked(Z, center, mask)
    values: Tensor = torch.linalg.svdvals(Z)
    return values


def _masked(Z: Tensor, center: bool, mask: Any) -> Tensor:
    if mask is None:
        return _less(Z, Z.mean(-2, keepdim=True))
    keep = torch.as_tensor(mask).to(Z.device).bool()
    if keep.shape != Z.shape[:-1]:
        raise InputError(
            f"the mask has shape {tuple(keep.shape)}, the rows {tuple(Z.shape[:-1])}; they match"
        )
    kept = keep.unsqueeze(-1)
    # Rows of zeros add nothing to the singular values: no need to cut the batch up.
    Z = torch.where(kept, Z, 0.0)
    if not all_finite(Z):
        raise InputError("the matrix holds NaN or infinite values in rows that count")
    if center:
        count = kept.sum(-2, keepdim=True).clamp_min(1)
        Z = torch.where(kept, _less(Z, Z.sum(-2, keepdim=True) / count), 0.0)
    return Z


def _less(Z: Tensor, mean: Tensor) -> Tensor:
    """Subtract the mean; what is left of a constant is rounding, and no direction of its own."""
    centred = Z - mean
    rounding = 8 * torch.finfo(Z.dtype).eps * mean.abs()
    return torch.where(centred.abs() <= rounding, 0.0, centred)
