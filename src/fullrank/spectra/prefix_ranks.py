"""Effective ranks of all prefixes of a sequence from a few Cholesky factors of one Gram matrix.

With the Gram matrix ``U`` of all rows, ``log det(U_t + s)`` of its leading t x t block is the sum
of the first t logarithms of the diagonal of one Cholesky factor of ``U + s``: one factor knows
every prefix. Centring a prefix is a change of rank one, ``1^T (U_t + s)^-1 1``, which a
substitution with that factor knows for every prefix as well. So, with ``lambda`` the squared
singular values of a prefix whose rows are centred,

    phi(s) = sum log(1 + lambda / s) = log det(U_t + s) - t log s + log((s / t) 1^T (U_t + s)^-1 1)

and sums over singular values are integrals of it: ``2 pi sum lambda^a / (...) = int s^(a - 1)
phi(s) ds``, whose constant is ``pi / (a sin(pi a))``, with a = 1/2 for the sum of the singular
values and the derivative by a there for their entropy. In ``x = log s`` the integrand is analytic
within pi of the real axis, where the trapezoidal rule converges geometrically: with steps of
``h`` the relative error is about ``exp(-2 pi^2 / h)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.linalg.blas import gram
from fullrank.spectra.parallel import each

# Between nodes in log s. Effective ranks then are off by 1e-5 of theirs or less, where one
# direction holds almost all by 3e-5, as measured.
_STEP = 1.8
# The largest node over the largest eigenvalue, or nearly: three terms of the logarithm's series
# hold beyond.
_TOP = 10.0
# No node is added once what is left to find is this share of the sum of singular values.
_LEFT = 3e-6
# Factors do in float32 while their pivots are above this share of the largest eigenvalue, and so
# many times above what rounding does to the others.
_SINGLE, _ABOVE_ROUNDING = 1e-5, 64
# Rows whose largest number is smaller, or larger than its inverse, have no squares in float32.
_SMALLEST = 1e-12
# Nodes that both tails are continued to.
_TAIL = 64
# Numbers in the Gram matrices that are worked on at once by a thread of the CPU: its caches hold
# them.
_CACHED = 2**18


@torch.no_grad()
def prefix_ranks(rows: Tensor, sizes: Tensor, eps: float) -> Tensor:
    """Effective rank of the first ``sizes`` rows, centred, of each sequence.

    Parameters
    ----------
    rows
        ``(B, n, D)``, float32 or float64. In float32 their Gram matrix is in float32 too for the
        larger s, which is enough for them.
    sizes
        ``(B, K)`` integers in ``[2, min(n, D)]``.
    eps
        Added to the sum of the singular values and inside the logarithm, as VERL does.

    Returns
    -------
    Tensor
        ``(B, K)``, float64; 1 for prefixes whose rows are all alike.
    """
    count, length = rows.shape[:2]
    if rows.device.type != "cpu":
        return _ranks(rows, sizes, eps)
    step = max(1, _CACHED // length**2)
    found = torch.empty(sizes.shape, dtype=torch.float64)
    parts = [slice(at, at + step) for at in range(0, count, step)]
    for part, ranks in each(lambda part: _ranks(rows[part], sizes[part], eps), parts):
        found[part] = ranks
    return found


def _ranks(rows: Tensor, sizes: Tensor, eps: float) -> Tensor:
    # Any constant may be taken off the rows first: near zero, less is lost by centring prefixes.
    real = torch.arange(rows.shape[1], device=rows.device) < sizes.amax(1)[:, None]
    if real.all():
        rows = rows - rows.mean(1, keepdim=True)
    else:
        # What stands behind the longest prefix has no part in it.
        weights = (real / sizes.amax(1)[:, None]).to(rows.dtype)[:, None]
        rows = torch.where(real[..., None], rows - weights @ rows, 0.0)
    if rows.dtype == torch.float32 and not _SMALLEST < float(rows.abs().max()) < 1 / _SMALLEST:
        rows = rows.double()
    products = _gram(rows)
    scale = _largest(products).double()
    scale = torch.where(scale > 0, scale, 1.0)[:, None]
    wide = rows.double()
    trace, alike = _traces(wide, sizes)
    exact = partial(_gram, wide) if rows.dtype != wide.dtype else lambda: products
    determinants = _Determinants(products, exact, scale, sizes)
    total, weighted = _integrals(determinants, trace / scale, sizes - 1)
    total = total.clamp_min(1e-300)
    entropy = total.log() - weighted / (2 * total)
    # Of p = sigma / (sum + eps), and of the eps in the logarithm to first order.
    share = total / (total + eps / scale.sqrt())
    entropy = share * (entropy - share.log()) - eps * (sizes - 1)
    return torch.where(alike, 1.0, entropy.exp())


def _gram(rows: Tensor) -> Tensor:
    # The symmetric product gains in float64 alone.
    if len(rows) > 1 or rows.dtype == torch.float32:
        return rows @ rows.mT
    return gram(rows[0].T)[None]


def _largest(gram: Tensor) -> Tensor:
    """Largest eigenvalue, from below, of matrices that have no negative ones; within a third."""
    # The column of the longest row is no stranger to the leading direction.
    longest = gram.diagonal(dim1=1, dim2=2).argmax(1)
    vector = gram[torch.arange(len(gram), device=gram.device), longest, :, None]
    for _ in range(4):
        vector = vector / vector.norm(dim=1, keepdim=True).clamp_min(1e-300)
        vector = gram @ vector
    found: Tensor = vector.norm(dim=1)[:, 0]
    return found


def _traces(rows: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the eigenvalues of each centred prefix, and whether it is all rounding."""
    squares = torch.linalg.vector_norm(rows, dim=-1).square().cumsum(1).gather(1, sizes - 1)
    inside = torch.arange(rows.shape[1], device=rows.device) < sizes[..., None]
    trace = squares - (inside.to(rows.dtype) @ rows).square().sum(-1) / sizes
    alike = trace <= 1e-13 * squares
    return torch.where(alike, 0.0, trace), alike


class _Determinants:
    """``phi(s)`` of every prefix, by a Cholesky factor each time it is called.

    Parameters
    ----------
    gram, exact
        ``(B, n, n)``, and what makes it in float64 once that is needed.
    scale
        ``(B, 1)``: what it is divided by.
    sizes
        ``(B, K)`` rows of each prefix.
    """

    def __init__(
        self, gram: Tensor, exact: Callable[[], Tensor], scale: Tensor, sizes: Tensor
    ) -> None:
        self.sizes = sizes
        self._exact, self._scale, self._rows = exact, scale[..., None], gram.shape[1]
        self._single = self._bordered(gram, torch.float32)
        n = self._rows
        mean = float(self._single.diagonal(dim1=1, dim2=2)[:, :n].mean(1).max())
        rounding = torch.finfo(torch.float32).eps * n**0.5 * mean
        self._lowest = math.log(max(_SINGLE, _ABOVE_ROUNDING * rounding)) / 2
        self._single_does = True
        self.smallest = 4 * n * torch.finfo(torch.float64).eps

    def _bordered(self, gram: Tensor, dtype: torch.dtype) -> Tensor:
        # A last row of ones makes the factorisation do the substitution. Powers of two between
        # rows would have them compete for the same places of the caches.
        n = self._rows
        side = (n + 8) // 8 * 8
        side += 8 * (side % 64 == 0)
        found = gram.new_zeros(len(gram), side, side, dtype=dtype)
        torch.div(gram, self._scale.to(gram.dtype), out=found[:, :n, :n])
        found[:, -1, :n] = 1.0
        return found

    @cached_property
    def _double(self) -> Tensor:
        return self._bordered(self._exact(), torch.float64)

    def __call__(self, shift: float) -> Tensor:
        logs, solved = self._factor(self._single if self._single_does else self._double, shift)
        # Pivots shrink with the shift: once one is too small, those of smaller shifts are as well.
        if self._single_does and not bool(logs.min() >= self._lowest):
            self._single_does = False
            logs, solved = self._factor(self._double, shift)
        places = self.sizes - 1
        plain = (2 * logs - math.log(shift)).cumsum(1).gather(1, places)
        ones = solved.square().cumsum(1).gather(1, places)
        return plain + (shift / self.sizes * ones).log()

    def _factor(self, base: Tensor, shift: float) -> tuple[Tensor, Tensor]:
        """Logarithms of the factor's diagonal, some NaN where it has none, and its last row."""
        matrix, n = base.clone(), self._rows
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        diagonal += shift
        diagonal[:, -1] = 2 * matrix.shape[1] / shift
        factor = torch.linalg.cholesky_ex(matrix)[0]
        return factor.diagonal(dim1=1, dim2=2)[:, :n].double().log(), factor[:, -1, :n].double()


class _Tail(NamedTuple):
    """``phi`` at nodes beyond those that were computed."""

    x: Tensor
    phi: Tensor


def _integrals(phi: _Determinants, trace: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """``sum sigma`` and ``sum sigma log sigma^2`` of every prefix."""
    x, found = [math.log(_TOP)], [phi(_TOP)]
    total = math.exp(x[0] / 2) * found[0]
    while math.exp(x[-1] - _STEP) > phi.smallest:
        x.append(x[-1] - _STEP)
        found.append(phi(math.exp(x[-1])))
        total = total + math.exp(x[-1] / 2) * found[-1]
        if len(x) >= 3 and float(_left(x[-1], found, rank, trace, total).max()) < _LEFT:
            break
    upper = _above(x, found, trace)
    lower = _below(x[-1], found)
    nodes = torch.cat([upper.x, torch.tensor(x, dtype=upper.x.dtype, device=upper.x.device)])
    nodes = torch.cat([nodes, lower.x])
    values = torch.cat([upper.phi, torch.stack(found, -1), lower.phi], -1)
    weighted = _STEP * values * (nodes / 2).exp()
    at_half, by_log = weighted.sum(-1), (weighted * nodes).sum(-1)
    # c = pi / (a sin(pi a)) is 2 pi at a = 1/2, and its derivative there -4 pi.
    total = at_half / (2 * math.pi)
    return total, by_log / (2 * math.pi) + 2 * total


def _left(x: float, found: list[Tensor], rank: Tensor, trace: Tensor, total: Tensor) -> Tensor:
    """Bound the share of the sum of singular values that the lower tail may get wrong."""
    bend = found[-1] - 2 * found[-2] + found[-3]
    # The slope counts the eigenvalues above s; each of the others may add its root.
    slope = (found[-1] - found[-2]) / _STEP
    missing = (rank - slope).clamp_min(0)
    error = math.exp(x / 2) * (0.01 * bend.abs() + missing)
    return torch.where(trace > 0, error / total.clamp_min(1e-300), 0.0)


def _above(x: list[float], found: list[Tensor], trace: Tensor) -> _Tail:
    """Continue by ``m1 / s - m2 / 2 s^2 + m3 / 3 s^3``, whose m2 and m3 two nodes tell."""
    s, t = math.exp(x[0]), math.exp(x[1])
    first, second = trace / s - found[0], trace / t - found[1]
    determinant = -1 / (6 * s**2 * t**3) + 1 / (6 * t**2 * s**3)
    m2 = (-first / (3 * t**3) + second / (3 * s**3)) / determinant
    m3 = (second / (2 * s**2) - first / (2 * t**2)) / determinant
    steps = torch.arange(_TAIL, 0, -1, dtype=trace.dtype, device=trace.device)
    nodes = x[0] + _STEP * steps
    inverse = (-nodes).exp()
    powers = [moment[..., None] * inverse**k / k for k, moment in ((1, trace), (2, m2), (3, m3))]
    return _Tail(nodes, powers[0] - powers[1] + powers[2])


def _below(x: float, found: list[Tensor]) -> _Tail:
    """Continue by ``a + rank log(1 / s) + c s``, which the last three nodes tell."""
    growth = math.exp(_STEP)
    bent = (found[-1] - 2 * found[-2] + found[-3]) / (1 - growth) ** 2  # c s
    slope = found[-1] - found[-2] - bent * (1 - growth)
    steps = torch.arange(1, _TAIL + 1, dtype=bent.dtype, device=bent.device)
    phi = (found[-1] - bent)[..., None] + slope[..., None] * steps
    return _Tail(x - _STEP * steps, phi + bent[..., None] * (-_STEP * steps).exp())
