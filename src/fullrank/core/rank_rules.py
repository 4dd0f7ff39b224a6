"""Rank rules: from one layer's spectrum, or all layers' spectra, to ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError

Vector = npt.NDArray[np.float64]

RankRule = Callable[[Vector, int, int], int | None]
"""``(singular values in descending order, out, in) -> rank``; None leaves the layer dense."""


class LayerSpectrum(NamedTuple):
    """What a rule may look at: descending singular values of an ``(out, in)`` matrix.

    Of a stack of so many matrices of that shape (a convolution's groups or filters), which get
    one rank, each value is the root of the sum of squares over the stack. ``eps`` is the relative
    spacing of the numbers the weight is kept in: float32's unless it is said.
    """

    values: Vector
    shape: tuple[int, int]
    stack: int = 1
    eps: float = 2.0**-23


@runtime_checkable
class ModelRule(Protocol):
    """A rule that must see every layer at once, or their names, before it decides on one."""

    def ranks(self, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int | None]:
        """Rank (or None: dense) for every layer named."""


def apply_rule(
    rule: RankRule | ModelRule, spectra: Mapping[str, LayerSpectrum]
) -> dict[str, int | None]:
    """Ask a rule of either kind for the rank of every layer.

    Raises
    ------
    InputError
        When a rank is outside ``[1, min(out, in)]``.

    Examples
    --------
    >>> import numpy as np
    >>> apply_rule(Energy(0.8), {"fc": LayerSpectrum(np.array([3.0, 1.0, 0.1]), (3, 4))})
    {'fc': 1}
    """
    if isinstance(rule, ModelRule):
        ranks = rule.ranks(spectra)
    else:
        ranks = {name: rule(s.values, *s.shape) for name, s in spectra.items()}
    for name, rank in ranks.items():
        top = min(spectra[name].shape)
        if rank is not None and not 1 <= rank <= top:
            raise InputError(f"{rule!r} gives {name} the rank {rank}; it must lie in [1, {top}]")
    return ranks


def _check_share(what: str, value: float) -> None:
    if not 0 < value <= 1:
        raise InputError(f"{what} is {value}; it must lie in (0, 1]")


@dataclass(frozen=True)
class Fixed:
    """The same rank for every layer; layers narrower than that stay dense.

    >>> Fixed(8)(np.ones(16), 16, 32), Fixed(8)(np.ones(4), 4, 32)
    (8, None)
    """

    rank: int

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"rank {self.rank}; it must be at least 1")

    def __call__(self, spectrum: Vector, m: int, n: int) -> int | None:
        """Rank of an (m, n) layer."""
        return self.rank if self.rank <= min(m, n) else None


@dataclass(frozen=True)
class FractionOfBreakEven:
    """``floor(f * floor(m n / (m + n)))``, the rule of Greenformers; 0 leaves the layer dense.

    >>> FractionOfBreakEven(0.5)(np.ones(384), 384, 1536)
    153
    """

    fraction: float

    def __post_init__(self) -> None:
        _check_share("the fraction of the break-even rank", self.fraction)

    def __call__(self, spectrum: Vector, m: int, n: int) -> int | None:
        """Rank of an (m, n) layer."""
        return int((m * n // (m + n)) * self.fraction) or None


@dataclass(frozen=True)
class ParamRatio:
    """``floor(m n / (c (m + n)))``: about ``1 / c`` of the parameters (PELA, section 3).

    >>> ParamRatio(2.0)(np.ones(384), 384, 1536)
    153
    """

    ratio: float

    def __post_init__(self) -> None:
        if not self.ratio >= 1:
            raise InputError(f"the compression ratio is {self.ratio}; it must be at least 1")

    def __call__(self, spectrum: Vector, m: int, n: int) -> int | None:
        """Rank of an (m, n) layer."""
        return int(m * n / (self.ratio * (m + n))) or None


@dataclass(frozen=True)
class Energy:
    """Smallest rank whose squared singular values hold the share ``tau`` of their sum.

    >>> Energy(0.98)(np.array([10.0, 1.0, 0.5]), 3, 3)
    1
    """

    tau: float

    def __post_init__(self) -> None:
        _check_share("the share of energy", self.tau)

    def __call__(self, spectrum: Vector, m: int, n: int) -> int | None:
        """Rank of an (m, n) layer."""
        energy = np.cumsum(np.square(spectrum))
        if not energy[-1] > 0:
            return None
        return min(int(np.searchsorted(energy, self.tau * energy[-1])) + 1, len(energy))


@dataclass(frozen=True)
class Value:
    """As many components as have a singular value of at least ``threshold``.

    >>> Value(0.6)(np.array([10.0, 1.0, 0.5]), 3, 3)
    2
    """

    threshold: float

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise InputError(f"the threshold is {self.threshold}; it must not be negative")

    def __call__(self, spectrum: Vector, m: int, n: int) -> int | None:
        """Rank of an (m, n) layer."""
        return int(np.count_nonzero(np.asarray(spectrum) >= self.threshold)) or None


@dataclass(frozen=True)
class PerKind:
    """A rank, a rule or None for each kind of layer, by name pattern; the first match wins.

    Parameters
    ----------
    kinds
        Shell pattern over canonical names -> rank (an int), rule, or None (dense). Layers that
        no pattern matches stay dense.

    Examples
    --------
    >>> rule = PerKind({"*.query": 2, "*.dense": Energy(0.5)})
    >>> layer = LayerSpectrum(np.array([2.0, 1.0, 1.0]), (3, 3))
    >>> rule.ranks({"0.query": layer, "0.key": layer, "0.dense": layer})
    {'0.query': 2, '0.key': None, '0.dense': 1}
    """

    kinds: Mapping[str, Any]

    def ranks(self, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int | None]:
        """Rank (or None: dense) for every layer named.

        Raises
        ------
        InputError
            When a pattern matches no layer.
        """
        unused = set(self.kinds)
        ranks: dict[str, int | None] = {}
        for name, seen in spectra.items():
            pattern = next((p for p in self.kinds if fnmatchcase(name, p)), None)
            unused.discard(pattern or "")
            kind = None if pattern is None else self.kinds[pattern]
            ranks[name] = kind(seen.values, *seen.shape) if callable(kind) else kind
        if unused:
            raise InputError(f"no layer is named like {sorted(unused)[0]!r}; see named_linears")
        return ranks
