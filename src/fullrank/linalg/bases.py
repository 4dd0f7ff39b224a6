"""Orthonormal bases of column spaces."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.linalg.checks import check_matrix, working


@torch.no_grad()
def orthonormal_basis(matrix: Tensor, *, rtol: float | None = None) -> Tensor:
    """Orthonormal basis of the space that a matrix's columns span.

    Parameters
    ----------
    matrix
        ``(m, n)``, any floating-point dtype, any strides.
    rtol
        Directions with a singular value of at most ``rtol`` times the largest are left out;
        ``max(m, n) * eps`` of the dtype by default, as for a numerical rank.

    Returns
    -------
    Tensor
        ``(m, k)`` with orthonormal columns, strongest direction first; k is the numerical rank
        (0 for a zero matrix). float64 for a float64 matrix, else float32.

    Raises
    ------
    ValueError
        On a matrix that is empty, not finite, no matrix, or not of a floating-point dtype.

    Examples
    --------
    >>> import torch
    >>> Q = orthonormal_basis(torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 0.0]]))
    >>> Q.shape, torch.allclose(Q.T @ Q, torch.eye(1))
    (torch.Size([3, 1]), True)
    """
    check_matrix(matrix)
    A = working(matrix)
    U: Tensor
    U, values, _ = torch.linalg.svd(A, full_matrices=False)
    eps = torch.finfo(matrix.dtype).eps if matrix.dtype.itemsize >= 4 else torch.finfo(A.dtype).eps
    limit = (max(A.shape) * eps if rtol is None else rtol) * values[0]
    return U[:, : int((values > limit).sum())].contiguous()


def orthonormalised(columns: Tensor) -> Tensor:
    """Q of a QR factorisation: as many columns as there were, orthonormal whatever their rank."""
    # torch.linalg.qr would make R as well.
    reflectors, tau = torch.geqrf(columns)
    Q: Tensor = torch.linalg.householder_product(reflectors[:, : len(tau)], tau)
    return Q
