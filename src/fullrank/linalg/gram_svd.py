"""Leading singular triplets by way of the smaller Gram matrix."""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

from fullrank.linalg.blas import eigh, gram
from fullrank.linalg.checks import check_matrix, check_rank, double, range_scale
from fullrank.linalg.svd import SVD

# Squaring in float32 moves up to about 2e-6 of the largest eigenvalue from what is kept to what is
# dropped: less than 0.2 % of the error where that is at least this share.
_DROPPED = 5e-4
# The projections on two vectors are orthogonal up to 1e-6 of the largest eigenvalue over theirs.
_KEPT = 1e-3
# In float64 they are, up to 1e-16 over the product of both shares: where the least value is below
# this share of the largest, they are made so.
_GRADED = 1e-4
# Narrower matrices take no time to speak of in float64.
_NARROW = 256


class GramSVD(NamedTuple):
    """Leading triplets, and what is left.

    Attributes
    ----------
    svd
        ``U``, ``S``, ``Vh`` of rank r.
    lost
        Relative squared error of their product, ``sum_{i > r} s_i^2 / sum s_i^2``.
    """

    svd: SVD
    lost: float


@torch.no_grad()
def gram_svd(matrix: Tensor, rank: int, *, orthonormal: bool = True) -> GramSVD:
    """Leading ``rank`` singular triplets, from the eigenvectors of the smaller Gram matrix.

    One of U and V holds eigenvectors, the other with S is the matrix projected on them: their
    product is as good as the subspace. Large matrices of float32 or less are worked on in float32
    if their spectrum is flat enough for it, all others in float64, where components down to 1e-7
    of the largest are found.

    Parameters
    ----------
    matrix
        ``(m, n)``, any floating-point dtype and strides.
    rank
        r in ``[1, min(m, n)]``.
    orthonormal
        Whether both U and V must be orthonormal. Where the product alone counts, float32 will do
        for more matrices.

    Returns
    -------
    GramSVD
        In the dtype that was worked in.

    Raises
    ------
    ValueError
        On a rank out of range, or a matrix that is empty, not finite or not 2-D.

    Examples
    --------
    >>> found = gram_svd(torch.diag(torch.tensor([3.0, 1.0, 2.0])), rank=2)
    >>> found.svd.S.tolist(), round(found.lost, 4)
    ([3.0, 2.0], 0.0714)
    """
    check_matrix(matrix)
    check_rank(rank, matrix.shape)
    A = matrix.detach()
    wide = A.shape[0] < A.shape[1]
    tall = A.T if wide else A
    found = None
    if A.dtype != torch.float64 and rank < tall.shape[1] >= _NARROW:
        found = _projected(tall.float(), rank, _DROPPED, _KEPT if orthonormal else 0.0)
    (U, S, Vh), lost = found or _projected(double(tall), rank)
    if orthonormal and float(S.min()) <= _GRADED * float(S.max()):
        U, S, turn = torch.linalg.svd(U * S, full_matrices=False)
        Vh = turn @ Vh
    svd = SVD(Vh.T, S, U.T) if wide else SVD(U, S, Vh)
    return GramSVD(svd, lost)


@overload
def _projected(tall: Tensor, rank: int) -> GramSVD: ...


@overload
def _projected(tall: Tensor, rank: int, dropped: float, kept: float) -> GramSVD | None: ...


def _projected(tall: Tensor, rank: int, dropped: float = 0.0, kept: float = 0.0) -> GramSVD | None:
    """Project on the leading eigenvectors; None where eigenvalues are below such shares."""
    scale = range_scale(tall)
    T = tall if scale == 1.0 else tall / scale
    values, vectors = eigh(gram(T))
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    tail, total = values[rank:].sum(), values.sum()
    if tail < dropped * values[0] or values[rank - 1] < kept * values[0]:
        return None
    V = vectors[:, :rank].contiguous()
    left = T @ V
    sizes = left.norm(dim=0)
    U = left / sizes.clamp_min(torch.finfo(sizes.dtype).tiny)
    lost = float(tail / total) if total > 0 else 0.0
    return GramSVD(SVD(U, sizes * scale, V.T), lost)
