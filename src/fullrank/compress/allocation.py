"""Spend a budget of parameters where it does the most: ranks for all layers at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError
from fullrank.core.plan import break_even
from fullrank.core.rank_rules import LayerSpectrum


class Step(NamedTuple):
    """One layer at one size."""

    rank: int | None
    size: int
    loss: float


@dataclass(frozen=True)
class LossCurve:
    """What a layer loses at each size: from smallest to dense, on the lower convex hull.

    Only sizes on the hull can be best for some price of a parameter, so that "next reduction =
    least added loss per saved parameter" walks exactly along it.
    """

    steps: tuple[Step, ...]

    def at_price(self, price: float) -> Step:
        """Size at which loss plus price times parameters is least."""
        return min(self.steps, key=lambda s: (s.loss + price * s.size, s.size))


def loss_curve(
    loss: npt.NDArray[np.float64],
    shape: tuple[int, int],
    grid: int = 8,
    scale: float = 1.0,
    stack: int = 1,
) -> LossCurve:
    """Build a layer's curve from what dropping each component costs.

    Parameters
    ----------
    loss
        ``(k,)``, most important component first.
    shape
        ``(out, in)``.
    grid
        Ranks are multiples of this; of an eighth of the layer's narrower side if that is less.
    scale
        Multiplies every loss.
    stack
        Matrices of that shape that get one rank together.
    """
    m, n = shape
    step = max(1, min(grid, min(m, n) // 8))
    tail = np.concatenate([np.cumsum(loss[::-1])[::-1], [0.0]]) * scale
    top = break_even(m, n)
    ranks = list(range(step, top + 1, step)) or ([top] if top else [])
    steps = [Step(r, stack * r * (m + n), float(tail[min(r, len(loss))])) for r in ranks]
    steps.append(Step(None, stack * m * n, 0.0))
    return LossCurve(tuple(_hull(steps)))


def curves_from(
    spectra: Mapping[str, LayerSpectrum], grid: int = 8, relative: bool = False
) -> dict[str, LossCurve]:
    """Build every layer's curve; ``relative`` counts each loss against the layer's own total."""
    curves = {}
    for name, seen in spectra.items():
        loss = np.square(seen.values)
        total = float(loss.sum())
        scale = 1 / total if relative and total > 0 else 1.0
        curves[name] = loss_curve(loss, seen.shape, grid, scale, seen.stack)
    return curves


def allocate(curves: Mapping[str, LossCurve], keep: float) -> dict[str, int | None]:
    """Ranks of least total loss within a share of the dense parameters.

    Parameters
    ----------
    curves
        One for each layer.
    keep
        Share of their dense parameters to spend, in (0, 1].

    Returns
    -------
    dict
        Layer -> rank, or None for dense. Allocations for falling shares are nested: no rank
        ever rises.

    Raises
    ------
    InputError
        When even the smallest sizes need more than that share.

    Examples
    --------
    >>> steep = loss_curve(np.array([9.0] + [0.01] * 63), (64, 64))
    >>> flat = loss_curve(np.ones(64), (64, 64))
    >>> allocate({"steep": steep, "flat": flat}, keep=0.7)
    {'steep': 8, 'flat': None}
    """
    if not 0 < keep <= 1:
        raise InputError(f"the share to keep is {keep}; it must lie in (0, 1]")
    dense = sum(curve.steps[-1].size for curve in curves.values())
    least = sum(curve.steps[0].size for curve in curves.values())
    budget = keep * dense
    if least / dense > keep:
        raise InputError(
            f"these layers cannot be made smaller than {least / dense:.1%} of their parameters; "
            f"{keep:.1%} was asked"
        )
    # Go down along all hulls together, cheapest reduction first, until the budget is met. What a
    # reduction costs rises along each hull, so one sort gives the order in which they are taken.
    level = {name: len(curve.steps) - 1 for name, curve in curves.items()}
    moves = sorted(
        (_price(curve.steps[i - 1], curve.steps[i]), -i, name)
        for name, curve in curves.items()
        for i in range(1, len(curve.steps))
    )
    size = dense
    for _, index, name in moves:
        if size <= budget:
            break
        steps = curves[name].steps
        size -= steps[-index].size - steps[-index - 1].size
        level[name] = -index - 1
    return {name: curve.steps[level[name]].rank for name, curve in curves.items()}


@dataclass(frozen=True)
class Budget:
    """Rank rule: least summed loss within a share of all layers' parameters.

    Parameters
    ----------
    keep
        Share of the layers' dense parameters, in (0, 1].
    grid
        Ranks are multiples of this (see :func:`loss_curve`).
    relative
        Count each layer's loss against its own total. False where losses are of one thing and
        comparable between layers, as those of ``method="gauss_newton"`` are.

    Examples
    --------
    >>> layer = LayerSpectrum(np.array([9.0] + [0.01] * 63), (64, 64))
    >>> Budget(0.3).ranks({"a": layer, "b": layer})
    {'a': 8, 'b': 8}
    """

    keep: float
    grid: int = 8
    relative: bool = True

    def ranks(self, spectra: Mapping[str, LayerSpectrum]) -> dict[str, int | None]:
        """Rank (or None: dense) for every layer named."""
        return allocate(curves_from(spectra, self.grid, self.relative), self.keep)


def _price(smaller: Step, larger: Step) -> float:
    return (smaller.loss - larger.loss) / (larger.size - smaller.size)


def _hull(steps: list[Step]) -> list[Step]:
    """Lower convex hull of loss against size; steps come in order of size."""
    hull: list[Step] = []
    for step in steps:
        while len(hull) >= 2 and _price(hull[-2], hull[-1]) <= _price(hull[-1], step):
            hull.pop()
        hull.append(step)
    return hull
