"""A whole spectrum from a few products with the matrix, and how far it may be off."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.linalg.bases import orthonormalised
from fullrank.linalg.blas import thin_product
from fullrank.linalg.checks import Seed, check_matrix, gaussian, range_scale, working

# A Ritz pair is taken for a singular pair when the sine of its angle to one is at most this: its
# value is then off by about the square.
_CONVERGED = 0.03
# Where an eigenvalue, relative to the largest that is sampled, is rounding in float32.
_FLOOR = 1e-9
# What the leading values leave of the sum of squares is rounding where so much less of it is seen.
_UNSEEN = 0.01


@dataclass(frozen=True)
class SampledSpectrum:
    """Singular values estimated from random probes.

    Attributes
    ----------
    values
        ``(min(m, n),)``, float64, descending.
    replicates
        ``(probes, min(m, n))``: the same estimate with one probe left out each time. The spread
        of any quantity over them gives its standard error (the jackknife).
    coarse
        ``(min(m, n),)``: the same estimate from half as many Lanczos steps. How far a quantity
        moves from there to ``values`` tells how far it may still be from its limit.
    leading
        How many of the largest values were computed rather than sampled.
    """

    values: Tensor
    replicates: Tensor
    coarse: Tensor
    leading: int


@torch.no_grad()
def sampled_spectrum(
    matrix: Tensor, *, probes: int = 8, steps: int = 24, block: int = 48, generator: Seed = None
) -> SampledSpectrum:
    """Estimate every singular value by stochastic Lanczos quadrature.

    The leading singular values come from block power iteration, as far as it converged. The
    density of the others is that of Gauss quadratures from Lanczos runs with random starting
    vectors orthogonal to them (Ubaru, Chen and Saad 2017, Lin, Saad and Yang 2016), scaled so
    that the sum of squares is the matrix's. Quantities that average over the spectrum (sums,
    effective rank, energy ranks) are good to about a percent; single values inside it are
    quantiles of a smooth density.

    Parameters
    ----------
    matrix
        ``(m, n)``, any floating-point dtype and strides; half precision is worked on in float32.
    probes
        Random starting vectors, at least 3; the standard error falls with their square root.
    steps
        Lanczos steps of each, at least 2.
    block
        Columns in the block power iteration.
    generator
        A ``torch.Generator``, a seed, or None for the global generator.

    Raises
    ------
    ValueError
        On a matrix that is empty, not finite or not 2-D, or on too few probes or steps.

    Examples
    --------
    >>> import torch
    >>> W = torch.randn(300, 400, generator=torch.Generator().manual_seed(0))
    >>> estimate = sampled_spectrum(W, generator=0).values.sum()
    >>> abs(estimate / torch.linalg.svdvals(W).sum() - 1).item() < 0.02
    True
    """
    check_matrix(matrix)
    if probes < 3 or steps < 2 or block < 1:
        raise ValueError(
            f"probes={probes}, steps={steps}, block={block}; expected at least 3, 2 and 1"
        )
    A = working(matrix)
    scale = range_scale(A)
    A = A if scale == 1.0 else A / scale
    S = A if A.shape[0] <= A.shape[1] else A.T
    d = S.shape[0]
    U, leading = _leading(S, min(block, d), generator)
    energy = float(S.square().sum(dtype=torch.float64))
    rest = max(energy - float(leading.square().sum()), 0.0)
    bulk = d - len(leading)
    none = torch.cat([leading, leading.new_zeros(bulk)]) * scale
    nothing = SampledSpectrum(none, none.expand(probes, -1).clone(), none, len(leading))
    if bulk == 0 or rest <= torch.finfo(S.dtype).eps * energy:
        return nothing
    T = _lanczos(S, U, probes, min(steps, bulk), generator)
    # A probe's first coefficient is on average its share of the sum of squares.
    if not bulk * float(T[:, 0, 0].mean()) > _UNSEEN * rest:
        return nothing

    def rebuild(T: Tensor) -> Tensor:
        nodes, weights = _quadrature(T)
        tail = _quantiles(nodes, weights, len(leading), bulk)
        tail = tail * math.sqrt(rest / float(tail.square().sum()))
        return torch.cat([leading, tail]).sort(descending=True).values * scale

    others = [torch.cat([T[:i], T[i + 1 :]]) for i in range(probes)]
    half = max(T.shape[1] // 2, 1)
    return SampledSpectrum(
        values=rebuild(T),
        replicates=torch.stack([rebuild(each) for each in others]),
        coarse=rebuild(T[:, :half, :half]),
        leading=len(leading),
    )


def _leading(S: Tensor, block: int, seed: Seed) -> tuple[Tensor, Tensor]:
    """Left singular vectors ``(d, k)`` and values ``(k,)`` that block iteration found."""
    # Two steps separate singular values that differ by a third, which is what sampling needs:
    # those that stand out.
    Q = orthonormalised(thin_product(S, gaussian(S.shape[1], block, S, seed)))
    for _ in range(2):
        Q = orthonormalised(thin_product(S, thin_product(S.T, Q)))
    B = thin_product(S.T, Q).T
    small = B.double() @ B.double().T
    squares, V = torch.linalg.eigh(small)
    values = squares.flip(0).clamp_min(0).sqrt()
    V = V.flip(1).to(S)
    U, right = Q @ V, V.T @ B
    # sigma u = S v holds by construction on one side; the gap on the other is the residual.
    norms = right.norm(dim=1).clamp_min(torch.finfo(S.dtype).tiny)
    residual = (thin_product(S, (right / norms[:, None]).T) - U * norms).norm(dim=0)
    missed = (residual > _CONVERGED * norms).nonzero()
    k = int(missed[0]) if len(missed) else block
    return U[:, :k], values[:k]


def _lanczos(S: Tensor, U: Tensor, probes: int, steps: int, seed: Seed) -> Tensor:
    """Tridiagonal matrices ``(probes, steps, steps)`` of ``S S^T`` orthogonal to ``U``."""
    if isinstance(seed, int):
        seed += 1  # not the block that the leading vectors were found with

    def outside(x: Tensor) -> Tensor:
        return x - U @ (U.T @ x)

    q = outside(gaussian(S.shape[0], probes, S, seed))
    q = q / q.norm(dim=0)
    basis = [q]
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for step in range(steps):
        w = outside(thin_product(S, thin_product(S.T, basis[-1])))
        alphas.append((w * basis[-1]).sum(0))
        # Against all earlier vectors: in float32 the three-term recurrence loses them at once.
        for v in basis:
            w = w - v * (w * v).sum(0)
        norm = w.norm(dim=0)
        if step + 1 < steps:
            betas.append(norm)
            # Nothing is left of a vector whose squares are too small for numbers.
            basis.append(torch.where(norm > torch.finfo(S.dtype).tiny ** 0.5, w / norm, 0.0))
    T = torch.diag_embed(torch.stack(alphas, 1).double())
    if betas:
        off = torch.stack(betas, 1).double()
        T = T + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    return T


def _quadrature(T: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss nodes of all probes together, and their weights."""
    nodes, vectors = torch.linalg.eigh(T)
    return nodes.flatten(), vectors[:, 0, :].square().flatten()


def _quantiles(nodes: Tensor, weights: Tensor, before: int, count: int) -> Tensor:
    """``count`` singular values spread as weighted eigenvalues; ``before`` larger ones precede."""
    order = nodes.argsort(descending=True)
    ordered = nodes[order].clamp_min(_FLOOR * float(nodes.max())).clamp_min(1e-300)
    share = weights[order] / weights.sum()
    # Each node stands in the middle of its share. Between nodes the logarithm is linear in that
    # of the place among all values, which makes a power law of a power law.
    place = (before + count * (share.cumsum(0) - share / 2)).log()
    wanted = before + torch.arange(count, dtype=torch.float64, device=nodes.device) + 0.5
    wanted = wanted.log()
    right = torch.searchsorted(place, wanted).clamp(1, len(place) - 1)
    left = right - 1
    span = (place[right] - place[left]).clamp_min(1e-300)
    part = ((wanted - place[left]) / span).clamp(0, 1)
    logs = ordered.log()
    return (torch.lerp(logs[left], logs[right], part) / 2).exp()
