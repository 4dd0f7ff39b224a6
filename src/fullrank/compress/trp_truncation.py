"""Truncation to a share of a matrix's energy, and the nuclear norm's subgradient there."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.compress.stacked_svd import gram_eigh


class Truncation(NamedTuple):
    """What is left of ``(..., m, n)`` matrices.

    Attributes
    ----------
    matrix
        ``T(M)``, ``(..., m, n)``: the leading R components, R the least number whose squared
        singular values hold the wanted share of the sum. Bit-equal to M where R is full.
    subgradient
        ``U_R V_R^T``, ``(..., m, n)``: a subgradient of the nuclear norm at ``T(M)``.
    ranks
        ``(...)``, R of each matrix; 0 for one that is zero.
    """

    matrix: Tensor
    subgradient: Tensor
    ranks: Tensor


@torch.no_grad()
def truncate(matrix: Tensor, energy: float) -> Truncation:
    """Truncate each of a stack of matrices to its own rank.

    Parameters
    ----------
    matrix
        ``(..., m, n)``, any strides; worked on in its own dtype, in float32 at least.
    energy
        Share of ``sum s_i^2`` to retain, in (0, 1].

    Returns
    -------
    Truncation
        In the dtype of ``matrix``.

    Raises
    ------
    InputError
        When the matrix holds values that are not finite.

    Examples
    --------
    >>> truncate(torch.diag(torch.tensor([3.0, 1.0])), energy=0.9).matrix
    tensor([[3., 0.],
            [0., 0.]])
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    tall = matrix.shape[-2] > matrix.shape[-1]
    M = wide.mT if tall else wide
    squares, U = gram_eigh(M)
    # Kept is whatever the components before it do not suffice without.
    before = squares.cumsum(-1) - squares
    keep = before < energy * squares.sum(-1, keepdim=True)
    ranks = keep.sum(-1)
    # Of a trained network that is a fraction of all, and the products below cost as much.
    top = int(ranks.max())
    U, keep = U[..., :top], keep[..., :top]
    rows = U.mT @ M
    truncated = (U * keep[..., None, :]) @ rows
    signs = (U * (keep * _inverse(rows.norm(dim=-1)))[..., None, :]) @ rows
    if tall:
        truncated, signs = truncated.mT, signs.mT
    # All of a matrix is itself, to the last bit.
    whole = (ranks == squares.shape[-1])[..., None, None]
    return Truncation(torch.where(whole, matrix, truncated.to(matrix)), signs.to(matrix), ranks)


def _inverse(sizes: Tensor) -> Tensor:
    """``1 / sizes``, and 0 for what is rounding: it has no direction."""
    if not sizes.numel():
        return sizes
    # Squaring halves the digits that tell a small component from none.
    null = 8 * torch.finfo(sizes.dtype).eps ** 0.5 * sizes.amax(-1, keepdim=True)
    return torch.where(sizes > null, 1 / sizes, 0)
