"""The leading singular vectors of a mean gradient that is never held.

A gradient is folded into two thin products as it comes, ``Y = G Omega`` and ``Z = Psi G`` with
Gaussian ``Omega (n, k)`` and ``Psi (l, m)``: both are linear in ``G``, so sums over batches and
processes are those of the mean gradient. From them ``G`` is recovered to low rank as
``Q (Psi Q)^+ Z`` with ``Q`` a basis of ``Y`` (Tropp, Yurtsever, Udell and Cevher, Practical
sketching algorithms for low-rank matrix approximation, SIAM J. Matrix Anal. 2017).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fullrank.adapters.gradients import shared
from fullrank.linalg import orthonormal_basis

# Columns of Omega for a rank that is asked for, and rows of Psi for a column: the paper's l = 2 k.
_COLUMNS, _ROWS = 4, 2


class GradientSketch:
    """A mean gradient of which only the leading singular triplets are wanted.

    Parameters
    ----------
    omega, psi
        ``(n, k)`` and ``(l, m)``; see :func:`sketches`.
    rank
        Triplets wanted.

    Examples
    --------
    >>> sketch = sketches({"w": (30, 40)}, {"w": 2}, seed=0)["w"]
    >>> G = torch.outer(torch.arange(30.0), torch.ones(40))
    >>> sketch.add(G), sketch.add(3 * G)
    (None, None)
    >>> U, S, Vh, norm = sketch.triplets(count=2)
    >>> torch.allclose(U[:, :1] * S[:1] @ Vh[:1], 2 * G, rtol=1e-4, atol=1e-3)
    True
    """

    def __init__(self, omega: Tensor, psi: Tensor, rank: int) -> None:
        self.rank = rank
        self._omega, self._psi = omega, psi
        self._Y = omega.new_zeros(psi.shape[1], omega.shape[1])
        self._Z = omega.new_zeros(psi.shape[0], omega.shape[0])

    def add(self, gradient: Tensor) -> None:
        """Fold a gradient in, which may be freed then."""
        gradient = gradient.to(self._Y.dtype)
        self._Y.addmm_(gradient, self._omega)
        self._Z.addmm_(self._psi, gradient)

    def triplets(self, count: int) -> tuple[Tensor, Tensor, Tensor, float]:
        """``U``, ``S``, ``Vh`` of the mean over so many gradients, and an estimate of its norm."""
        Y, Z = shared(self._Y / count), shared(self._Z / count)
        norm = float(torch.linalg.vector_norm(Z)) / len(Z) ** 0.5
        if not 0 < norm < float("inf"):
            return Y[:, :0], Y.new_zeros(0), Z[:0], norm
        Q = orthonormal_basis(Y)
        X = torch.linalg.lstsq(self._psi @ Q, Z).solution
        U, S, Vh = torch.linalg.svd(X, full_matrices=False)
        return Q @ U[:, : self.rank], S[: self.rank], Vh[: self.rank], norm

    @property
    def numbers(self) -> int:
        """How many numbers it holds of its own."""
        return self._Y.numel() + self._Z.numel()


def sketches(
    shapes: Mapping[str, tuple[int, ...]],
    ranks: Mapping[str, int],
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> dict[str, GradientSketch]:
    """Return a sketch for each weight; weights of one shape share their Gaussian matrices.

    Parameters
    ----------
    shapes
        Name -> ``(m, n)``.
    ranks
        Name -> triplets wanted.
    seed
        Of the Gaussian matrices.
    device, dtype
        Of the sketches.
    """
    generator = torch.Generator().manual_seed(seed)
    made: dict[tuple[int, int], Tensor] = {}

    def gaussian(rows: int, columns: int) -> Tensor:
        if (rows, columns) not in made:
            drawn = torch.randn(rows, columns, generator=generator, dtype=dtype)
            made[rows, columns] = drawn.to(device)
        return made[rows, columns]

    found = {}
    for name, (m, n) in shapes.items():
        columns = min(_COLUMNS * ranks[name], m, n)
        rows = min(_ROWS * columns + 1, m)
        found[name] = GradientSketch(gaussian(n, columns), gaussian(rows, m), ranks[name])
    return found
