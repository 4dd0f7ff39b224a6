"""Leading singular triplets: exact, randomized, and warm-started."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.linalg.bases import orthonormalised
from fullrank.linalg.checks import Seed, check_matrix, check_rank, gaussian, range_scale, working


class SVD(NamedTuple):
    """Leading singular triplets of an ``(m, n)`` matrix.

    Attributes
    ----------
    U
        ``(m, r)``, orthonormal columns.
    S
        ``(r,)``, descending.
    Vh
        ``(r, n)``, orthonormal rows.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    def matrix(self) -> Tensor:
        """Return the ``(m, n)`` product."""
        return (self.U * self.S) @ self.Vh


@torch.no_grad()
def truncated_svd(matrix: Tensor, rank: int) -> SVD:
    """Leading ``rank`` singular triplets, from a full factorisation.

    Parameters
    ----------
    matrix
        ``(m, n)``, any floating-point dtype and strides. Half precision is worked on in float32.
    rank
        r in ``[1, min(m, n)]``.

    Returns
    -------
    SVD
        In float64 for a float64 matrix, else in float32. Fresh memory: it does not keep the
        factors of the whole matrix alive.

    Raises
    ------
    ValueError
        On a rank out of range, or a matrix that is empty, not finite or not 2-D.

    Examples
    --------
    >>> import torch
    >>> svd = truncated_svd(torch.diag(torch.tensor([3.0, 1.0, 2.0])), rank=2)
    >>> svd.S.tolist()
    [3.0, 2.0]
    """
    U, S, Vh = torch.linalg.svd(_checked(matrix, rank), full_matrices=False)
    return SVD(
        U[:, :rank].clone(memory_format=torch.contiguous_format),
        S[:rank].clone(),
        Vh[:rank].clone(memory_format=torch.contiguous_format),
    )


@torch.no_grad()
def randomized_svd(
    matrix: Tensor,
    rank: int,
    *,
    oversample: int = 10,
    iterations: int = 2,
    generator: Seed = None,
) -> SVD:
    """Leading ``rank`` singular triplets by a randomized range finder.

    Halko, Martinsson and Tropp 2011, algorithms 4.4 and 5.1: a Gaussian sketch, power iterations
    re-orthonormalised at every half step, and a small dense SVD. For a spectrum with a clear
    drop after ``rank`` the result is that of :func:`truncated_svd` to rounding; for a flat one
    more iterations bring it closer.

    Parameters
    ----------
    matrix
        ``(m, n)``, any floating-point dtype and strides.
    rank
        r in ``[1, min(m, n)]``.
    oversample
        Extra columns of the sketch (5 to 10, loc. cit. section 1.3).
    iterations
        Power iterations, 0 or more.
    generator
        A ``torch.Generator``, a seed, or None for the global generator.

    Returns
    -------
    SVD
        In float64 for a float64 matrix, else in float32.

    Raises
    ------
    ValueError
        As :func:`truncated_svd`, and on negative ``oversample`` or ``iterations``.

    Examples
    --------
    >>> import torch
    >>> A = torch.outer(torch.ones(30), torch.ones(20))
    >>> round(randomized_svd(A, rank=1, generator=0).S.item() ** 2)
    600
    """
    A = _checked(matrix, rank)
    if oversample < 0 or iterations < 0:
        raise ValueError(
            f"oversample={oversample} and iterations={iterations}; neither may be negative"
        )
    # The entries of a sketch are larger than the matrix's.
    scale = range_scale(A)
    A = A if scale == 1.0 else A / scale
    m, n = A.shape
    width = min(rank + oversample, m, n)
    Q = orthonormalised(A @ gaussian(n, width, A, generator))
    for _ in range(iterations):
        Q = orthonormalised(A @ orthonormalised(A.T @ Q))
    U, S, Vh = _from_range(A, Q, rank)
    return SVD(U, S * scale, Vh)


@torch.no_grad()
def subspace_iteration(
    matrix: Tensor,
    rank: int,
    *,
    start: Tensor | None = None,
    iterations: int = 1,
    generator: Seed = None,
) -> SVD:
    """Leading ``rank`` singular triplets by block power iteration, warm-started.

    A matrix that changed little since its last factorisation needs one step from the old right
    singular vectors; pass ``start=previous.Vh``. Without a start it begins from a random block.

    Parameters
    ----------
    matrix
        ``(m, n)``, any floating-point dtype and strides.
    rank
        r in ``[1, min(m, n)]``.
    start
        ``(k, n)`` rows to start from, k at least ``rank``; need not be orthonormal. More rows
        than ``rank`` are a guard block, which speeds convergence.
    iterations
        Steps, each one product with the matrix and one with its transpose; at least 1.
    generator
        For a random start: a ``torch.Generator``, a seed, or None for the global generator.

    Returns
    -------
    SVD
        In float64 for a float64 matrix, else in float32.

    Raises
    ------
    ValueError
        As :func:`truncated_svd`; on a start of another width or with fewer rows than ``rank``.

    Examples
    --------
    >>> import torch
    >>> A = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5]))
    >>> cold = subspace_iteration(A, 2, iterations=8, generator=0)
    >>> warm = subspace_iteration(A + 0.01, 2, start=cold.Vh)
    >>> exact = truncated_svd(A + 0.01, 2)
    >>> torch.allclose(warm.S, exact.S, rtol=1e-4)
    True
    """
    A = _checked(matrix, rank)
    if iterations < 1:
        raise ValueError(f"{iterations} iterations; at least 1 is needed")
    if start is None:
        rows = gaussian(A.shape[1], rank, A, generator).T
    else:
        check_matrix(start, "start")
        if start.shape[1] != A.shape[1] or not rank <= start.shape[0] <= min(A.shape):
            raise ValueError(
                f"the start has shape {tuple(start.shape)}; for this matrix and rank it needs "
                f"{rank} to {min(A.shape)} rows of length {A.shape[1]}"
            )
        rows = start.to(A)
    V = orthonormalised(rows.T)
    for _ in range(iterations - 1):
        V = orthonormalised(A.T @ orthonormalised(A @ V))
    return _from_range(A, orthonormalised(A @ V), rank)


def _checked(matrix: Tensor, rank: int) -> Tensor:
    """Return the matrix in the dtype it is worked on in, or say why it has no such triplets."""
    check_matrix(matrix)
    check_rank(rank, matrix.shape)
    return working(matrix)


def _from_range(A: Tensor, Q: Tensor, rank: int) -> SVD:
    """Leading triplets of ``Q Q^T A``, through the small matrix ``Q^T A``."""
    U, S, Vh = torch.linalg.svd(Q.T @ A, full_matrices=False)
    return SVD(Q @ U[:, :rank], S[:rank].clone(), Vh[:rank].clone())
