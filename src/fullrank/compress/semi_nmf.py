"""Semi-NMF: a matrix as a free factor times a non-negative one.

Ding, Li, Jordan: "Convex and Semi-Nonnegative Matrix Factorizations", IEEE TPAMI 32(1), 2010. It
is one of the solvers of Greenformers (arXiv 2109.06762).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.linalg.checks import all_finite

# Added to a denominator that may vanish, and to the start so that no entry begins at zero, where
# multiplicative steps would leave it.
_EPS = 1e-9
_START = 1e-4
# Steps end when the error changes by less than this, for each column.
_CONVERGED = 1e-10


@torch.no_grad()
def semi_nmf(
    matrix: Tensor,
    rank: int,
    iterations: int = 10,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Factor X into ``F @ H`` with ``H >= 0``, lowering the squared error step by step.

    Parameters
    ----------
    matrix
        X: ``(n, m)``, of any sign. Work is done in float64.
    rank
        Rank r in ``[1, min(n, m)]``.
    iterations
        Steps at most: 10 in Greenformers (``num_iter``).
    start
        ``(r, m)``, not negative, where H begins; drawn from U[0, 1) + 1e-4 by default.
    generator
        Of that draw; a fixed seed by default.

    Returns
    -------
    F, H
        ``(n, r)`` and ``(r, m)``, float64.

    Raises
    ------
    InputError
        On a rank, a number of steps or a start that cannot be used, or a matrix that is not
        finite.

    Examples
    --------
    >>> X = torch.outer(torch.tensor([1.0, -2.0]), torch.tensor([1.0, 2.0, 3.0]))
    >>> F, H = semi_nmf(X, rank=1, iterations=100)
    >>> bool((H >= 0).all()), torch.allclose(F @ H, X.double(), rtol=1e-3)
    (True, True)
    """
    if matrix.ndim != 2 or not all_finite(matrix):
        raise InputError("semi-NMF factors a matrix of finite numbers")
    n, m = matrix.shape
    if not 1 <= rank <= min(n, m) or iterations < 1:
        raise InputError(
            f"rank {rank}, {iterations} iterations; a rank in [1, {min(n, m)}] and at least one "
            "iteration are expected"
        )
    X = matrix.to(torch.float64)
    H = _start(rank, m, start, generator).to(X)
    F, error = X.new_zeros(n, rank), float("inf")
    for _ in range(iterations):
        # The least-squares F for this H; the pseudo-inverse, since rows of H may become alike.
        F = X @ H.T @ torch.linalg.pinv(H @ H.T, hermitian=True)
        H = H * _step(X.T @ F, H, F.T @ F)
        before, error = error, float((X - F @ H).norm())
        if abs(before - error) < _CONVERGED * m:
            break
    return F, H


def _step(XtF: Tensor, H: Tensor, FtF: Tensor) -> Tensor:
    """Return what H is multiplied by: the root of pulling parts over pushing parts."""
    pull = XtF.clamp_min(0) + H.T @ (-FtF).clamp_min(0)
    push = (-XtF).clamp_min(0) + H.T @ FtF.clamp_min(0)
    return (pull / (push + _EPS)).sqrt().T


def _start(rank: int, m: int, start: Tensor | None, generator: torch.Generator | None) -> Tensor:
    if start is None:
        draw = generator or torch.Generator().manual_seed(0)
        shape = (rank, m)
        return torch.rand(shape, generator=draw, dtype=torch.float64, device=draw.device) + _START
    if start.shape != (rank, m) or not (start >= 0).all():
        raise InputError(
            f"the start is {tuple(start.shape)}; ({rank}, {m}) without negative entries is expected"
        )
    return start
