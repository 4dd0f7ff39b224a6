"""Subspaces by warm-started power iteration: a refresh without an SVD."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from fullrank.optim.subspace import Projection, Side, as_basis, floats, leading_bases

ENERGY = 0.999
"""Share of the exact SVD's captured energy that a cheaper basis must keep."""

# Power iteration stops where (step's number) * (share of the captured energy that it gained) is
# this small. Where singular values inside and outside the subspace are nearly equal it converges
# slowly, about like 1 / step, and then the product is what is still missing. On gradients of small
# language models up to five times as much was missing, which leaves a margin of two to 1 - ENERGY.
_CONVERGED = 1e-4
# A step costs two GEMMs and a QR, the decomposition that replaces them at least eight steps.
_MOST_STEPS = 6


class IterativeSubspace(Projection):
    """Leading singular vectors by power iteration from the old basis.

    A gradient that turned slowly since the last fit needs no SVD: a step or a few of block power
    iteration from the old basis capture what the SVD would. How much a step gained tells whether
    it was enough. As soon as it shows that a few more will not be, the eigenvectors of the
    gradient's Gram matrix are taken instead, so that at least 99.9 % of the SVD's energy is
    captured either way; seldom up to half a percent less, where a direction rises from almost
    nothing. The first fit is the SVD itself.

    Attributes
    ----------
    steps
        Power steps that gave the basis; 0 where it was not got by iteration.
    """

    def __init__(
        self,
        rank: int,
        side: Side,
        left: Tensor | None = None,
        right: Tensor | None = None,
        gemm: torch.dtype | None = None,
    ) -> None:
        super().__init__(rank, side, left, right, gemm)
        self.steps = 0

    def fit(self, weight: Tensor, grad: Tensor, generator: torch.Generator | None = None) -> Self:
        """Take power steps, or a decomposition where they are not enough."""
        return self.fit_many([self], [grad])[0]

    @classmethod
    def fit_many(cls, subspaces: Sequence[Self], grads: Sequence[Tensor]) -> list[Self]:
        """Fit several at once, reading from the device once a round of power steps."""
        found: list[Self | None] = [None] * len(subspaces)
        iterations = {
            i: _PowerIteration(grad, subspace.left, subspace.right)
            for i, (subspace, grad) in enumerate(zip(subspaces, grads, strict=True))
            if subspace.fitted
        }
        last: dict[int, float] = {}
        for steps in range(1, _MOST_STEPS + 1):
            if not iterations:
                break
            gains = torch.stack([each.step() for each in iterations.values()]).tolist()
            for (i, iteration), gain in zip(list(iterations.items()), gains, strict=True):
                if steps * gain <= _CONVERGED:
                    found[i] = subspaces[i]._iterated(iteration, grads[i], steps)
                    del iterations[i]
                elif not _promising(gain, last.get(i), steps):
                    del iterations[i]
                last[i] = gain
        return [
            fitted if fitted is not None else subspace._decomposed(grad)
            for subspace, fitted, grad in zip(subspaces, found, grads, strict=True)
        ]

    def _decomposed(self, grad: Tensor) -> Self:
        decompose = leading_bases_by_gram if self.fitted else leading_bases
        return self._with(*(as_basis(b, grad) for b in decompose(grad, self.rank, self.side)))

    def _iterated(self, iteration: _PowerIteration, grad: Tensor, steps: int) -> Self:
        fitted = self._with(as_basis(iteration.left, grad), as_basis(iteration.right, grad))
        fitted.steps = steps
        if iteration.grad is grad:
            fitted._ready = (grad, iteration.small)
        return fitted


def _promising(gain: float, before: float | None, steps: int) -> bool:
    """Whether gains that go on to shrink as they did will be small enough in time."""
    if before is None:
        return True
    ratio = min(gain / before, 1.0)
    return gain * ratio ** (_MOST_STEPS - steps) * _MOST_STEPS <= _CONVERGED


class _PowerIteration:
    """Block power iteration on one gradient, from given bases of one side or both."""

    def __init__(self, grad: Tensor, left: Tensor | None, right: Tensor | None) -> None:
        self.grad = floats(grad)
        self.left = None if left is None else left.to(self.grad.dtype)
        self.right = None if right is None else right.to(self.grad.dtype)
        self.small = self._down()
        self.energy = _energy(self.small)

    def _down(self) -> Tensor:
        small = self.grad if self.left is None else self.left.t() @ self.grad
        return small if self.right is None else small @ self.right.t()

    def step(self) -> Tensor:
        """Take one step and return the share of the captured energy that it gained."""
        G, left, right = self.grad, self.left, self.right
        if left is None:
            self.right = _orthonormal(G.t() @ self.small).t()
        elif right is None:
            self.left = _orthonormal(G @ self.small.t())
        else:
            self.left = _orthonormal(G @ right.t())
            self.right = _orthonormal(G.t() @ self.left).t()
        self.small = self._down()
        before, self.energy = self.energy, _energy(self.small)
        return (self.energy - before) / self.energy


def _energy(small: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(small)
    return norm.square()


def leading_bases_by_gram(
    grad: Tensor, rank: int, side: Side
) -> tuple[Tensor | None, Tensor | None]:
    """Leading singular vectors from the shorter side's Gram matrix, two to three times faster.

    Returns what :func:`~fullrank.optim.subspace.leading_bases` does. Singular values below about
    the root of the precision times the largest are lost in rounding, and their vectors are then
    any that complete the basis: of no account for the energy.
    """
    G = floats(grad)
    wide = G.shape[0] < G.shape[1]
    if wide:
        G = G.t()
    V = torch.linalg.eigh(G.t() @ G)[1][:, -rank:].flip(1)
    needs_long = side == "full" or side == ("right" if wide else "left")
    U = _orthonormal(G @ V) if needs_long else None
    left, right = (V, U) if wide else (U, V)
    return (
        None if side == "right" or left is None else left.contiguous(),
        None if side == "left" or right is None else right.t().contiguous(),
    )


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns)[0]
    return basis
