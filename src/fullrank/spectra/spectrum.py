"""`Spectrum`: the singular values of one matrix, and what they say."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError
from fullrank.spectra.values import as_tensor, singular_values

Vector = npt.NDArray[np.float64]


class Spectrum:
    """Singular values in descending order, and the ranks they amount to.

    Parameters
    ----------
    source
        A matrix ``(m, n)``, whose singular values are then computed in float64, or a vector of
        singular values in any order.
    missed
        Sum of the squares of the singular values that are not in the source, where it has the
        leading ones alone (from a sketch).

    Attributes
    ----------
    values
        ``(k,)`` float64 array, descending, read-only.
    missed
        0 for a whole spectrum. Else the square of each true singular value is above that of its
        estimate by at most this, and the nuclear norm of the whole above that of ``values`` by at
        most the root of this times the smaller side. Ranks by squares (stable, energy) count it;
        the effective rank and the participation ratio are those of ``values``.

    Raises
    ------
    InputError
        On anything but one or two dimensions, an empty, integer or non-finite source, or a
        negative singular value.

    Examples
    --------
    >>> spectrum = Spectrum([2.0, 1.0, 1.0])
    >>> spectrum.nuclear_norm, spectrum.stable_rank, spectrum.energy_rank(0.9)
    (4.0, 1.5, 3)
    >>> round(Spectrum([[3.0, 0.0], [0.0, 3.0]]).effective_rank, 6)
    2.0
    """

    def __init__(self, source: Any, *, missed: float = 0.0) -> None:
        tensor = as_tensor(source, "the source of a spectrum")
        if tensor.ndim not in (1, 2):
            raise InputError(
                f"a spectrum is made from a matrix or a vector of singular values, not from "
                f"shape {tuple(tensor.shape)}"
            )
        if not 0 <= missed < float("inf"):
            raise InputError(f"missed={missed}; a sum of squares is neither negative nor infinite")
        kind = "matrix" if tensor.ndim == 2 else "singular_values"
        values: Vector = singular_values(tensor, kind).cpu().numpy()  # type: ignore[arg-type]
        values.setflags(write=False)
        self.values = values
        self.missed = missed

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Spectrum):
            return NotImplemented
        return np.array_equal(self.values, other.values) and self.missed == other.missed

    def __hash__(self) -> int:
        return hash(self.values.tobytes())

    def __repr__(self) -> str:
        return (
            f"Spectrum({len(self)} values, largest {self.spectral_norm:.4g}, "
            f"effective rank {self.effective_rank:.4g})"
        )

    @property
    def relative(self) -> Vector:
        """Values divided by the largest; zeros for a zero matrix."""
        return self.values / (self.values[0] or 1.0)

    @property
    def spectral_norm(self) -> float:
        """Largest singular value."""
        return float(self.values[0])

    @property
    def nuclear_norm(self) -> float:
        """Sum of the singular values."""
        return float(self.values.sum())

    @property
    def frobenius_norm(self) -> float:
        """Square root of the sum of squares."""
        return float(np.sqrt(self.stable_rank) * self.values[0])

    @property
    def effective_rank(self) -> float:
        """See :func:`~fullrank.spectra.effective_rank` (eps 0)."""
        p = self.relative / (self.relative.sum() or 1.0)
        p = p[p > 0]
        if not len(p):
            return 0.0
        return float(np.exp(-(p * np.log(p)).sum()))

    @property
    def singular_values(self) -> Vector:
        """The same as :attr:`values`."""
        return self.values

    @property
    def nuclear(self) -> float:
        """The same as :attr:`nuclear_norm`."""
        return self.nuclear_norm

    @property
    def frobenius(self) -> float:
        """The same as :attr:`frobenius_norm`."""
        return self.frobenius_norm

    @property
    def stable_rank(self) -> float:
        """See :func:`~fullrank.spectra.stable_rank`."""
        return float(np.square(self.relative).sum()) + self._missed

    @property
    def participation_ratio(self) -> float:
        """See :func:`~fullrank.spectra.participation_ratio`."""
        energy = np.square(self.relative)
        return float(energy.sum() ** 2 / (np.square(energy).sum() or 1.0))

    @property
    def heavy_tail_alpha(self) -> float:
        """See :func:`~fullrank.spectra.heavy_tail_alpha`; NaN where too few values make a tail."""
        from fullrank.spectra.heavy_tail import heavy_tail_alpha

        try:
            return heavy_tail_alpha(self.values.copy(), input="singular_values").alpha
        except InputError:
            return float("nan")

    @property
    def energy(self) -> Vector:
        """Share of the sum of squares that the leading 1, 2, ... values hold; ends at 1.

        Lower, by what was missed, where the values are not all.
        """
        energy = np.cumsum(np.square(self.relative))
        return np.asarray(energy / (energy[-1] + self._missed or 1.0), dtype=np.float64)

    @property
    def _missed(self) -> float:
        """What was missed over the largest square."""
        largest = float(self.values[0]) or 1.0
        return self.missed / largest / largest

    def energy_rank(self, tau: float) -> int:
        """See :func:`~fullrank.spectra.energy_rank`; 0 for a zero matrix.

        Raises
        ------
        InputError
            When tau is not in (0, 1], or the values at hand do not hold that share.
        """
        if not 0 < tau <= 1:
            raise InputError(f"the share of energy is {tau}; it must lie in (0, 1]")
        energy = self.energy
        if self.missed and energy[-1] < tau:
            raise InputError(
                f"the {len(self)} values found hold {energy[-1]:.1%} of the energy, not {tau:.1%}: "
                "a larger sketch finds more"
            )
        if energy[-1] == 0:
            return 0
        return min(int(np.searchsorted(energy, tau)) + 1, len(energy))
