"""Singular components of a matrix, or of each of a stack of them, by the smaller Gram matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.linalg.checks import all_finite


class Components(NamedTuple):
    """``left @ right`` is the matrix; any prefix of the components is the best of its rank.

    Attributes
    ----------
    left, right
        ``(..., m, k)`` and ``(..., k, n)``, k the smaller of m and n. The one on the shorter side
        has orthonormal vectors, the other carries the sizes.
    sizes
        ``(..., k)`` singular values, descending up to rounding.
    """

    left: Tensor
    right: Tensor
    sizes: Tensor


@torch.no_grad()
def components(matrix: Tensor) -> Components:
    """Decompose ``(..., m, n)``, in float64: several times cheaper than an SVD in it.

    Raises
    ------
    InputError
        When the matrix holds values that are not finite.

    Examples
    --------
    >>> found = components(torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 0.0]]))
    >>> found.sizes.tolist()
    [3.0, 2.0]
    """
    M = matrix.detach().to(torch.float32 if matrix.device.type == "mps" else torch.float64)
    if M.shape[-2] <= M.shape[-1]:
        _, left = gram_eigh(M)
        right = left.mT @ M
        return Components(left, right, right.norm(dim=-1))
    _, basis = gram_eigh(M.mT)
    left = M @ basis
    return Components(left, basis.mT, left.norm(dim=-2))


def gram_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values and left vectors of ``(..., m, n)``, largest first.

    Raises
    ------
    InputError
        When the matrix holds values that are not finite.
    """
    if not all_finite(matrix):
        raise InputError("the weight holds NaN or infinite values")
    gram = matrix @ matrix.mT
    try:
        values, vectors = torch.linalg.eigh(gram)
    except RuntimeError:
        # An accelerator's solver can give up where LAPACK's does not.
        found = torch.linalg.eigh(gram.double().cpu())
        values, vectors = (part.to(gram) for part in found)
    return values.flip(-1).clamp_min(0), vectors.flip(-1)
