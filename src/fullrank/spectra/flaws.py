"""Dead and duplicated directions of a weight matrix: rank that is stored and does nothing.

*Dead directions* are singular values that cannot be told from the rounding of the stored numbers:
independent errors of rounding with standard deviation ``s`` make a matrix of spectral norm about
``s (sqrt(m) + sqrt(n))``. *Zero* rows and columns are below a millionth of the median length.
*Near-duplicates* are rows (outputs) or columns (inputs) that are parallel to an earlier one, with
a cosine of at least 0.999 in size; opposite ones count. Those of fewer than eight numbers are not
compared: they are parallel by chance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.spectra.spectrum import Spectrum

PARALLEL = 0.999
"""Size of the cosine from which two rows are near-duplicates."""

_ZERO = 1e-6  # of the median length
_SHORT = 8  # numbers; shorter rows are not compared
_CHUNK = 512  # rows compared with all before them at a time
_SCREEN = 24  # dimensions in which pairs are screened
# What a Gram matrix in float64 still resolves, relative to the largest value.
_RESOLVED = 2.0**-26


@dataclass(frozen=True)
class Parallels:
    """Rows (or columns) of a matrix that repeat an earlier one, or are zero.

    Attributes
    ----------
    count, zeros
        How many repeat an earlier one, and how many are zero.
    examples
        At most three pairs ``(earlier, later)``.
    """

    count: int
    zeros: int
    examples: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Flaws:
    """What of a matrix does nothing.

    Attributes
    ----------
    dead
        Singular directions within the rounding of the stored numbers. Of a matrix of two factors
        only those within its stored rank count.
    floor
        The singular value below which a direction counts as dead.
    rows, columns
        Near-duplicates and zeros among outputs and among inputs.
    """

    dead: int
    floor: float
    rows: Parallels
    columns: Parallels

    @property
    def any(self) -> bool:
        """Whether there is anything to report."""
        sides = (self.rows, self.columns)
        return bool(self.dead or any(side.count or side.zeros for side in sides))


@torch.no_grad()
def find_flaws(
    matrix: Tensor, spectrum: Spectrum, *, dtype: torch.dtype | None = None, rank: int | None = None
) -> Flaws:
    """Look for dead and duplicated directions.

    Parameters
    ----------
    matrix
        ``(m, n)``.
    spectrum
        Its singular values.
    dtype
        In which the model stores it; that of ``matrix`` by default.
    rank
        Of a matrix of two factors.

    Examples
    --------
    >>> W = torch.eye(8)
    >>> W[3] = -2 * W[0]
    >>> found = find_flaws(W, Spectrum(W))
    >>> found.dead, found.rows.examples, found.columns.zeros
    (1, ((0, 3),), 1)
    """
    floor = rounding_floor(spectrum, (matrix.shape[0], matrix.shape[1]), dtype or matrix.dtype)
    stored = spectrum.values[:rank]
    work = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    return Flaws(
        dead=int((stored <= floor).sum()),
        floor=floor,
        rows=parallels(work),
        columns=parallels(work.T),
    )


def rounding_floor(spectrum: Spectrum, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """Spectral norm that rounding a matrix's numbers to ``dtype`` adds, as a rule.

    >>> round(rounding_floor(Spectrum([1.0] * 100), (100, 100), torch.bfloat16), 5)
    0.00451
    """
    m, n = shape
    unit = torch.finfo(dtype).eps / 2  # largest relative error of a rounded number
    root_mean_square = spectrum.frobenius_norm / math.sqrt(m * n)
    # Errors are spread evenly, up to `unit` for numbers just above a power of two: hence 3.
    noise = unit * root_mean_square / math.sqrt(3) * (math.sqrt(m) + math.sqrt(n))
    return max(noise, _RESOLVED * spectrum.spectral_norm)


@torch.no_grad()
def parallels(matrix: Tensor) -> Parallels:
    """Rows that are parallel to an earlier row, and rows of zeros.

    Pairs are screened in a few random dimensions. Projecting never lengthens a difference, so
    that no near-duplicate is missed; only rows with a pair that passes are compared in full.

    >>> W = torch.eye(8)
    >>> W[2], W[5] = 0 * W[2], 3 * W[4] + 0.001 * W[1]
    >>> parallels(W)
    Parallels(count=1, zeros=1, examples=((4, 5),))
    """
    lengths = matrix.norm(dim=1)
    median = lengths.median()
    alive = torch.nonzero(lengths > _ZERO * median).flatten()
    zeros = len(lengths) - len(alive)
    if len(alive) < 2 or matrix.shape[1] < _SHORT:
        return Parallels(0, zeros)
    units = matrix[alive] / lengths[alive, None]
    screened = _projected(units)
    # |a - b|^2 of unit vectors at the limit, and what float32 may be off by.
    limit = 2 - 2 * PARALLEL + 1e-5
    count = 0
    examples: list[tuple[int, int]] = []
    squares = screened.square().sum(1)
    for start in range(0, len(units), _CHUNK):
        stop = min(start + _CHUNK, len(units))
        products = screened[start:stop] @ screened[:stop].T
        gaps = squares[start:stop, None] + squares[None, :stop] - 2 * products.abs()
        near = (gaps <= limit) & _earlier(start, stop, gaps.device)
        rows = torch.nonzero(near.any(1)).flatten()
        if not len(rows):
            continue
        cosines = (units[start + rows] @ units[:stop].T).abs()
        found = (cosines >= PARALLEL) & _earlier(start, stop, gaps.device)[rows]
        hits = torch.nonzero(found.any(1)).flatten()
        count += len(hits)
        for hit in hits[: 3 - len(examples)].tolist():
            first = int(torch.nonzero(found[hit])[0])
            examples.append((int(alive[first]), int(alive[start + int(rows[hit])])))
    return Parallels(count, zeros, tuple(examples))


def _projected(units: Tensor) -> Tensor:
    width = units.shape[1]
    if width <= _SCREEN:
        return units
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(width, _SCREEN, generator=generator, dtype=torch.float64)
    basis: Tensor = torch.linalg.qr(directions).Q.to(units)
    return units @ basis


def _earlier(start: int, stop: int, device: torch.device) -> Tensor:
    """``(stop - start, stop)``: True where the column's row comes before the row's."""
    rows = torch.arange(start, stop, device=device)[:, None]
    before: Tensor = torch.arange(stop, device=device)[None, :] < rows
    return before
