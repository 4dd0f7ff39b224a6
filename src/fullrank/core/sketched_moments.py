"""Second moments too wide to keep: a random sketch of them, and how much it misses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.core.moments import Sums


class SketchedValues(NamedTuple):
    """Leading eigenvalues of a second moment from a sketch.

    Attributes
    ----------
    values
        ``(sketch,)`` float64, descending; each at most the true one.
    missed
        The trace minus their sum. No true eigenvalue is above its estimate (0 for those behind
        the sketch) by more than this.
    """

    values: Tensor
    missed: float


class SketchedMoments(Sums):
    """Count, sum, trace and a sketch ``C Omega`` of the second moment ``C = sum x x^T``.

    Takes ``2 d l`` numbers instead of ``d^2``. Being a sum over samples, it streams, merges and
    is summed over processes as the whole moment is; ``Omega`` is drawn from the seed alone. The
    eigenvalues are those of the Nystrom approximation (Tropp, Yurtsever, Udell and Cevher 2017,
    arXiv 1706.05736, algorithm 3). What it leaves of C is positive semidefinite, so that its
    trace, known exactly, bounds the error of every eigenvalue; in expectation that trace is at
    most ``1 + r / (l - r - 1)`` times the sum of all eigenvalues behind the first r, for every
    r < l - 1 (their theorem 4.1).

    Parameters
    ----------
    width
        Length d of each vector.
    sketch
        Columns l of Omega, at most d.
    device
        Where the sums live; the CPU by default.
    seed
        Of Omega; the same in all processes whose sums are added.

    Examples
    --------
    >>> moments = SketchedMoments(1000, sketch=8)
    >>> moments.update(torch.eye(1000)[:3])
    >>> found = moments.eigenvalues()
    >>> found.values[:4].round(decimals=6).tolist(), found.missed < 1e-9
    ([1.0, 1.0, 1.0, 0.0], True)
    """

    sums = ("sum", "sketched", "trace")

    def __init__(
        self, width: int, sketch: int, device: torch.device | str = "cpu", seed: int = 0
    ) -> None:
        super().__init__(width, device)
        if not 1 <= sketch <= width:
            raise InputError(f"a sketch of {sketch} columns for width {width}; expected 1 to width")
        # Drawn on the CPU: the same numbers wherever the sums live.
        draw = torch.Generator().manual_seed(seed)
        omega = torch.randn(width, sketch, generator=draw, dtype=torch.float64)
        self.omega = torch.linalg.qr(omega).Q.to(device)
        self.sketched = torch.zeros_like(self.omega)
        self.trace = torch.zeros((), dtype=torch.float64, device=device)

    def _add(self, rows: Tensor) -> None:
        self.sketched.addmm_(rows.T, rows @ self.omega)
        self.trace += rows.square().sum()

    def _move(self, by: Tensor) -> None:
        half = self.sum - self.count / 2 * by
        self.sketched -= torch.outer(half, by @ self.omega) + torch.outer(by, half @ self.omega)
        self.trace -= 2 * half @ by

    def eigenvalues(self, center: bool = False) -> SketchedValues:
        """Leading eigenvalues of the second moment, or of the centred one, not divided by N."""
        self._check_seen()
        sketched, trace = self.sketched, self.trace
        if center:
            sketched = sketched - torch.outer(self.sum, self.mean @ self.omega)
            trace = trace - self.sum @ self.mean
        # A shift keeps the small matrix positive definite; it is taken off at the end.
        shift = torch.finfo(torch.float64).eps * sketched.norm()
        shifted = sketched + shift * self.omega
        core = self.omega.T @ shifted
        lower, failed = torch.linalg.cholesky_ex((core + core.T) / 2)
        if failed:
            # Rank deficient beyond what the shift mends, e.g. all samples zero.
            values, vectors = torch.linalg.eigh((core + core.T) / 2)
            kept = values > shift
            half = (sketched @ vectors[:, kept]) / values[kept].sqrt()
        else:
            half = torch.linalg.solve_triangular(lower, shifted.T, upper=False).T
        squares = torch.linalg.svdvals(half).square() - shift
        found = squares.new_zeros(self.omega.shape[1])
        found[: len(squares)] = squares.clamp_min(0)
        return SketchedValues(found, max(float(trace - found.sum()), 0.0))
