"""How much the leading singular subspaces of two matrices have in common: principal angles."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.linalg import randomized_svd
from fullrank.spectra.spectrum import Vector

# Shorter sides up to this are decomposed in full; above it the leading part is sampled.
_FULL = 2048


@dataclass(frozen=True)
class Overlap:
    """Principal angles between the leading ``rank`` singular subspaces of two matrices.

    Attributes
    ----------
    rank
        Dimensions of the subspaces, r.
    shape
        ``(m, n)`` of both matrices.
    left, right
        ``(r,)`` cosines of the principal angles between the left (output) and the right (input)
        subspaces, descending: all 1 for the same subspace, all 0 for orthogonal ones.
    """

    rank: int
    shape: tuple[int, int]
    left: Vector
    right: Vector

    @property
    def left_share(self) -> float:
        """Mean squared cosine on the left: the share of one subspace that lies in the other."""
        return float((self.left**2).mean())

    @property
    def right_share(self) -> float:
        """The same on the right."""
        return float((self.right**2).mean())

    @property
    def by_chance(self) -> tuple[float, float]:
        """What two random subspaces of that many dimensions share: ``r / m`` and ``r / n``."""
        return self.rank / self.shape[0], self.rank / self.shape[1]


@torch.no_grad()
def subspace_overlap(one: Tensor, other: Tensor, rank: int) -> Overlap:
    """Compare the leading singular subspaces of two matrices of one shape.

    Parameters
    ----------
    one, other
        ``(m, n)``, e.g. a weight before and after tuning, or a dense one and the product of the
        factors it was shrunk to.
    rank
        r in ``[1, min(m, n)]``; no more than either matrix has, or the angles are noise.

    Raises
    ------
    InputError
        On shapes that differ, or a rank out of range.

    Examples
    --------
    >>> W = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    >>> turned = W[[0, 1, 3, 2]]
    >>> found = subspace_overlap(W, turned, rank=3)
    >>> [abs(round(cosine, 6)) for cosine in found.left.tolist()], round(found.right_share, 6)
    ([1.0, 1.0, 0.0], 1.0)
    """
    if one.ndim != 2 or one.shape != other.shape:
        raise InputError(
            f"matrices of shapes {tuple(one.shape)} and {tuple(other.shape)}; subspaces of one "
            "shape are compared"
        )
    if not 1 <= rank <= min(one.shape):
        raise InputError(f"rank {rank}; it must lie in [1, {min(one.shape)}]")
    U, V = leading_subspaces(one, rank)
    P, Q = leading_subspaces(other, rank)
    shape = (one.shape[0], one.shape[1])
    return Overlap(rank, shape, _cosines(U, P), _cosines(V, Q))


def leading_subspaces(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Orthonormal bases ``(m, r)`` and ``(n, r)`` of the leading singular subspaces, in float64.

    The shorter side's basis comes from the eigenvectors of the Gram matrix, the other from it:
    several times cheaper than a singular value decomposition of a long matrix, and as good for
    directions well above 1e-8 of the largest.
    """
    W = matrix.double()
    if min(W.shape) > _FULL:
        found = randomized_svd(W, rank, iterations=4, generator=0)
        return found.U, found.Vh.T
    tall = W.shape[0] >= W.shape[1]
    A = W if tall else W.T
    _, vectors = torch.linalg.eigh(A.T @ A)
    short = vectors[:, -rank:].flip(1)
    long = torch.linalg.qr(A @ short).Q
    return (long, short) if tall else (short, long)


def _cosines(first: Tensor, second: Tensor) -> Vector:
    cosines: Vector = torch.linalg.svdvals(first.T @ second).clamp(0, 1).cpu().numpy()
    return cosines
