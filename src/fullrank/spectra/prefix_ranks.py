"""Effective ranks of all prefixes of a sequence from a few Cholesky factors of one Gram matrix.

With the Gram matrix ``U`` of all rows, ``log det(U_t + s)`` of its leading t x t block is the sum
of the first t logarithms of the diagonal of one Cholesky factor of ``U + s``: one factor knows
every prefix. Centring a prefix is a change of rank one, ``1^T (U_t + s)^-1 1``, which a
substitution with that factor knows for every prefix as well. So, with ``lambda`` the squared
singular values of a prefix whose rows are centred,

    phi(s) = sum log(1 + lambda / s) = log det(U_t + s) - t log s + log((s / t) 1^T (U_t + s)^-1 1)

Sums over singular values are integrals of it, ``2 pi sum lambda^(1/2) = int s^(-1/2) phi(s) ds``.
In ``log s`` the integrand is analytic within pi of the real axis, so that a few nodes, evenly
spaced, do; which weights suit them best is found by least squares: those that make of the
functions ``log(1 + lambda / s)``, with the moments ``1``, ``lambda`` and ``lambda^2``, whose sums
are known, the functions ``lambda^(1/2)`` and, for the entropy, ``lambda^(1/2) log lambda``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property, lru_cache, partial

import torch
from torch import Tensor

from fullrank.linalg.blas import gram
from fullrank.spectra.parallel import each

# Between nodes in log s. Effective ranks then are off by 1e-5 of theirs or less, where one
# direction holds almost all by up to 7e-5, as measured.
_STEP = 1.9
# The largest node, and the largest eigenvalue there may be, over the largest as estimated.
_TOP, _LARGEST = 0.5, 1.6
# Weights are made for eigenvalues down to so many times the smallest node.
_FROM = 10.0
# No node is added once the next would change effective ranks by less than this share, as judged
# by what the last two did.
_LEFT = 1e-5
# Factors do in float32 while their pivots are above this share of the largest eigenvalue, and so
# many times above what rounding does to the others.
_SINGLE, _ABOVE_ROUNDING = 1e-5, 64
# Rows that are all shorter, or one longer than its inverse, have no products in float32.
_SMALLEST = 1e-12
# Prefixes whose rows have less than this share of their squares about their mean are measured in
# float64.
_ALIKE = 1e-4
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
    products = _gram(rows)
    if rows.dtype == torch.float32 and not _SMALLEST < _longest(products) < 1 / _SMALLEST:
        rows = rows.double()
        products = _gram(rows)
    scale = _largest(products).double()
    scale = torch.where(scale > 0, scale, 1.0)[:, None]
    trace, squares, alike = _moments(rows, products, sizes)
    exact = partial(_exact_gram, rows) if rows.dtype == torch.float32 else lambda: products
    determinants = _Determinants(products, exact, scale, sizes)
    known = [torch.where(alike, 0.0, sizes - 1.0), trace / scale, squares / scale**2]
    total, weighted = _sums(determinants, known)
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


def _longest(gram: Tensor) -> float:
    return math.sqrt(float(gram.diagonal(dim1=1, dim2=2).max()))


def _exact_gram(rows: Tensor) -> Tensor:
    return _gram(rows.double())


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


def _moments(rows: Tensor, gram: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of each centred prefix's eigenvalues and of their squares; whether all is rounding."""
    inside = (torch.arange(gram.shape[1], device=gram.device) < sizes[..., None]).to(gram)
    size = sizes.to(gram)
    sums = (inside @ gram) * inside
    common = sums.sum(-1) / size
    spread = ((inside @ gram.square()) * inside).sum(-1)
    squares = spread - 2 / size * sums.square().sum(-1) + common.square()
    whole = (inside @ gram.diagonal(dim1=1, dim2=2)[..., None])[..., 0]
    trace, alike = whole - common, whole <= 0
    if bool((trace <= _ALIKE * whole).any()):
        rows, inside = rows.double(), inside.double()
        whole = torch.linalg.vector_norm(rows, dim=-1).square().cumsum(1).gather(1, sizes - 1)
        trace = whole - (inside @ rows).square().sum(-1) / sizes
        alike = trace <= 1e-13 * whole
    none = torch.zeros((), dtype=torch.float64, device=rows.device)
    # No sum of squares is larger than the square of the sum.
    squares = squares.double().clamp_min(0).minimum(trace.double().square())
    return torch.where(alike, none, trace), torch.where(alike, none, squares), alike


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


def _sums(phi: _Determinants, known: list[Tensor]) -> tuple[Tensor, Tensor]:
    """``sum sigma`` and ``sum sigma log sigma^2`` of every prefix.

    Parameters
    ----------
    phi
        Called at one node after another, until ranks have settled.
    known
        ``(B, K)`` each: how many eigenvalues, their sum, the sum of their squares.
    """
    found: list[Tensor] = []
    shift, ranks, last = _TOP, known[0], math.nan
    while True:
        found.append(phi(shift))
        shift *= math.exp(-_STEP)
        weights = _weights(len(found)).to(known[0].device)
        if shift <= phi.smallest:
            # What no node can tell from zero is no eigenvalue.
            above = torch.minimum((found[-1] - found[-2]) / _STEP, known[0])
            known = [above, *known[1:]]
        total, weighted = (torch.stack([*found, *known], -1) @ weights).unbind(-1)
        before, ranks = ranks, torch.where(known[1] > 0, total.log() - weighted / (2 * total), 0.0)
        change = float((ranks - before).abs().max()) if len(found) > 1 else math.nan
        # The next change is smaller by as much again as this one where they go on as they did, and
        # mostly by more. NaN, where there is no change to go by, is never small enough.
        ratio = change / max(last, 1e-300)
        if shift <= phi.smallest or change * min(ratio, 4 * ratio**2) < _LEFT:
            return total, weighted
        last = change


@lru_cache
def _weights(nodes: int) -> Tensor:
    """``(nodes + 3, 2)``: what makes the two sums of so many ``phi`` and three moments."""
    shifts = _TOP * torch.exp(-_STEP * torch.arange(nodes, dtype=torch.float64, device="cpu"))
    least = math.log(_FROM * float(shifts[-1]))
    values = torch.linspace(least, math.log(_LARGEST), 500, dtype=shifts.dtype, device="cpu")
    values = values.exp()[:, None]
    functions = torch.cat([torch.log1p(values / shifts), *(values**k for k in range(3))], 1)
    wanted = values.sqrt() * torch.cat([torch.ones_like(values), values.log()], 1)
    # Of equal relative error at all eigenvalues.
    even = values.rsqrt()
    found: Tensor = torch.linalg.lstsq(even * functions, even * wanted, rcond=1e-12).solution
    return found
