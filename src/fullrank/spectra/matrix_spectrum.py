"""What an X-ray finds in one weight matrix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fullrank.spectra.matrices import Kind
from fullrank.spectra.spectrum import Spectrum

ENERGIES = (0.9, 0.95, 0.99)
"""Shares of energy whose ranks are shown."""


@dataclass(frozen=True)
class MatrixSpectrum:
    """What the X-ray found in one weight matrix.

    Attributes
    ----------
    name
        Canonical module name.
    kind
        ``"linear"``, ``"embedding"``, or ``"head"`` (a language model's output layer).
    shape
        ``(out, in)``; ``(vocabulary, width)`` for embeddings.
    spectrum
        Its singular values, ``min(shape)`` of them.
    rank
        Rank of a matrix that is stored as two factors; None for a dense one.
    margins
        For sampled spectra: name of a measure -> half-width of its 95 % interval. Empty for
        exact ones.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    spectrum: Spectrum
    rank: int | None = None
    margins: Mapping[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """Effective rank as a share of the largest possible, ``min(shape)``."""
        return self.spectrum.effective_rank / min(self.shape)

    @property
    def parameters(self) -> int:
        """Numbers stored."""
        m, n = self.shape
        return m * n if self.rank is None else self.rank * (m + n)

    def measures(self) -> dict[str, float]:
        """Effective rank, stable rank, nuclear norm and energy ranks, by name."""
        return measures(self.spectrum)


def measures(spectrum: Spectrum) -> dict[str, float]:
    """Name -> value of every measure that a table shows."""
    return {
        "effective rank": spectrum.effective_rank,
        "stable rank": spectrum.stable_rank,
        "nuclear norm": spectrum.nuclear_norm,
        **{f"r{tau * 100:g}": spectrum.energy_rank(tau) for tau in ENERGIES},
    }
