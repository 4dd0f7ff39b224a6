"""The Sylvester equation ``A X + X B = C``."""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.linalg.checks import check_matrix, double

# A general equation is one linear system in the entries of X; beyond this many it is refused.
_MOST_UNKNOWNS = 4096


@torch.no_grad()
def solve_sylvester(A: Tensor, B: Tensor, C: Tensor, *, rtol: float | None = None) -> Tensor:
    """Solve ``A X + X B = C`` for ``X``.

    Symmetric A and B (such as the Gram matrices of adapters' factors) are diagonalised:
    ``X_ij = C_ij / (a_i + b_j)`` in their eigenbases. Other equations are solved as one dense
    linear system, up to 4,096 unknowns.

    Parameters
    ----------
    A
        ``(m, m)``.
    B
        ``(n, n)``.
    C
        ``(m, n)``.
    rtol
        By default a singular equation raises. With a number, directions whose ``|a_i + b_j|`` is
        at most ``rtol`` times the largest get 0: the least-squares solution of smallest norm.
        Symmetric A and B only.

    Returns
    -------
    Tensor
        ``(m, n)`` in the dtype and on the device of ``C``; the work is done in float64.

    Raises
    ------
    ValueError
        On shapes that do not fit, entries that are not finite, a singular equation (A and -B
        share an eigenvalue) without ``rtol``, or a general one that is too large.

    Examples
    --------
    >>> import torch
    >>> A, B = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([3.0]))
    >>> solve_sylvester(A, B, torch.tensor([[4.0], [10.0]])).tolist()
    [[1.0], [2.0]]
    """
    for name, matrix in (("left matrix", A), ("right matrix", B), ("right-hand side", C)):
        check_matrix(matrix, name)
    if A.shape[0] != A.shape[1] or B.shape[0] != B.shape[1] or C.shape != (len(A), len(B)):
        raise ValueError(
            f"A X + X B = C with A {tuple(A.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)}; "
            "expected (m, m), (n, n) and (m, n)"
        )
    a, b, c = double(A), double(B), double(C)
    if _symmetric(a) and _symmetric(b):
        return _diagonalised(a, b, c, rtol).to(C)
    if rtol is not None:
        raise ValueError("rtol needs symmetric A and B; this equation is not")
    return _dense(a, b, c).to(C)


def _symmetric(matrix: Tensor) -> bool:
    # The rounding of a float32 Gram matrix must not make it a general one.
    gap = torch.linalg.matrix_norm(matrix - matrix.T)
    return bool(gap <= 1e-6 * torch.linalg.matrix_norm(matrix))


def _diagonalised(a: Tensor, b: Tensor, c: Tensor, rtol: float | None) -> Tensor:
    left, U = torch.linalg.eigh((a + a.T) / 2)
    right, V = torch.linalg.eigh((b + b.T) / 2)
    limit = 1e-14 if rtol is None else rtol
    if rtol is None and _null(left, right, limit).any():
        raise ValueError(_SINGULAR + "; give rtol for the smallest least-squares solution")
    return solve_diagonalised(left, U, right, V, c, rtol=limit)


def solve_diagonalised(
    left: Tensor, U: Tensor, right: Tensor, V: Tensor, C: Tensor, *, rtol: float
) -> Tensor:
    """Solve ``A X + X B = C`` for symmetric A and B whose eigenvectors are at hand.

    Batched, and without a look at the numbers: nothing is checked and nothing raises.

    Parameters
    ----------
    left, U
        Eigenvalues ``(..., m)`` and eigenvectors ``(..., m, m)`` of A, as from
        :func:`torch.linalg.eigh`.
    right, V
        The same of B, ``(..., n)`` and ``(..., n, n)``.
    C
        ``(..., m, n)``.
    rtol
        Directions whose ``|a_i + b_j|`` is at most this part of the equation's largest get 0.

    Returns
    -------
    Tensor
        ``(..., m, n)``: the least-squares solution of smallest norm.

    Examples
    --------
    >>> one = torch.ones(1, 1)
    >>> solve_diagonalised(torch.tensor([3.0]), one, torch.tensor([1.0]), one, 8 * one, rtol=1e-9)
    tensor([[2.]])
    """
    null = _null(left, right, rtol)
    sums = left[..., :, None] + right[..., None, :]
    turned = U.mT @ C @ V
    X: Tensor = U @ torch.where(null, 0.0, turned / torch.where(null, 1.0, sums)) @ V.mT
    return X


def _null(left: Tensor, right: Tensor, rtol: float) -> Tensor:
    sums = (left[..., :, None] + right[..., None, :]).abs()
    return sums <= rtol * sums.amax(dim=(-2, -1), keepdim=True)


_SINGULAR = "the equation is singular: A and -B share an eigenvalue"


def _dense(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    m, n = c.shape
    if m * n > _MOST_UNKNOWNS:
        raise ValueError(
            f"a general equation with {m * n} unknowns; up to {_MOST_UNKNOWNS} are solved unless "
            "A and B are symmetric"
        )
    system = torch.kron(a, torch.eye(n).to(b)) + torch.kron(torch.eye(m).to(a), b.T.contiguous())
    # Far below the smallest singular value that a solution could be trusted at.
    if torch.linalg.cond(system) > 1e14:
        raise ValueError(_SINGULAR)
    X: Tensor = torch.linalg.solve(system, c.reshape(-1)).reshape(m, n)
    return X
