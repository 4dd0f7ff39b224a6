"""Random subspaces: semi-orthogonal bases that look at nothing but a generator."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor

from fullrank.optim.subspace import Projection, as_basis, floats


class RandomSubspace(Projection):
    """Uniformly random orthonormal bases (FRUGAL ``random``).

    Drawn on the CPU whatever the device, so that one seed means one basis everywhere.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> P = RandomSubspace(2, "right").fit(torch.zeros(5, 4), torch.zeros(5, 4), generator).right
    >>> torch.allclose(P @ P.T, torch.eye(2), atol=1e-6)
    True
    """

    draws = True

    def fit(self, weight: Tensor, grad: Tensor, generator: torch.Generator | None = None) -> Self:
        """Draw new bases; of the gradient only shape, dtype and device matter."""
        m, n = grad.shape
        left = None if self.side == "right" else semi_orthogonal(m, self.rank, grad, generator)
        right = None if self.side == "left" else semi_orthogonal(n, self.rank, grad, generator).t()
        return self._with(as_basis(left, grad), as_basis(right, grad))

    def align(self, old: Self) -> None:
        """Nothing to align: two draws have nothing in common."""


def semi_orthogonal(
    size: int, rank: int, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Return a ``(size, rank)`` matrix with orthonormal columns, uniform among all."""
    dtype = floats(like[:0]).dtype
    gaussian = torch.randn(size, rank, generator=generator, dtype=dtype).to(like.device)
    Q, R = torch.linalg.qr(gaussian)
    # QR fixes signs by its own rule; with those of R undone the distribution is uniform.
    basis: Tensor = Q.mul_(torch.where(R.diagonal() < 0, -1.0, 1.0).to(dtype))
    return basis
