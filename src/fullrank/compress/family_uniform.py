"""Plans that give every layer the same share of its rank, within a share of all parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from functools import cached_property

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError
from fullrank.core.plan import RankPlan

Vector = npt.NDArray[np.float64]


class UniformShare:
    """Plans by one fraction for all layers, the largest within a share of the parameters.

    The fraction itself is that share only where every layer is factorised. Layers that it leaves
    no rank stay dense, and so do some whatever it is; less is then left for the others.

    Parameters
    ----------
    plan
        Fraction in (0, 1] -> plan, in which a layer's rank is ``floor(fraction * top)``, and 0 is
        dense.
    top
        ``(out, in)`` of a layer's matrices -> its top.
    method
        Its name in messages.

    Examples
    --------
    >>> from fullrank.core.plan import PlanEntry
    >>> def plan(fraction):
    ...     return RankPlan({name: PlanEntry((m, 8), int(fraction * m * 8 / (m + 8)) or None)
    ...                      for name, m in (("a", 8), ("b", 2))})
    >>> found = UniformShare(plan, lambda m, n: m * n / (m + n))
    >>> found.smallest, plan(0.55).savings().kept, found.at_most(0.55).savings().kept
    (0.4, 0.6, 0.525)
    """

    def __init__(
        self,
        plan: Callable[[float], RankPlan],
        top: Callable[[int, int], float],
        method: str = "the method",
    ) -> None:
        self._plan, self._top, self._method = plan, top, method

    @property
    def smallest(self) -> float:
        """Share of the parameters that the smallest plan keeps."""
        return float(self._fractions[1].min())

    def at_most(self, share: float) -> RankPlan:
        """Return the plan of this fraction, or the largest fraction's that keeps no more than it.

        Raises
        ------
        InputError
            When every plan keeps more.
        """
        plan = self._plan(share)
        if plan.savings().kept <= share:
            return plan
        fractions, kept = self._fractions
        for fraction in fractions[kept <= share][::-1]:
            plan = self._plan(float(fraction))
            if plan.savings().kept <= share:
                return plan
        raise InputError(
            f"{self._method} keeps at least {self.smallest:.1%} of these layers; {share:.1%} was "
            "asked"
        )

    @cached_property
    def _fractions(self) -> tuple[Vector, Vector]:
        """One fraction between every two at which a rank changes, rising, and what it keeps."""
        # A layer may be factorised at one of these only: its top may be where factors save nothing.
        ends = (self._plan(1.0), self._plan(1.0 - 1e-9))
        layers: Counter[tuple[int, int, int]] = Counter()
        dense = 0
        for name, entry in ends[0].items():
            if any(plan[name].rank is not None for plan in ends):
                layers[(*entry.matrix_shape, entry.stack)] += 1
            else:
                dense += entry.dense_size
        changes = [np.arange(1, int(top) + 1) / top for top in self._tops(layers)]
        edges = np.unique(np.concatenate([*changes, [1.0]]))
        fractions = np.append((edges[:-1] + edges[1:]) / 2, 1.0)
        planned = np.full(len(fractions), float(dense))
        for ((m, n, stack), count), top in zip(layers.items(), self._tops(layers), strict=True):
            ranks = np.floor(fractions * top)
            sizes = np.where(ranks > 0, np.minimum(ranks * (m + n), m * n), m * n)
            planned += count * stack * sizes
        return fractions, planned / ends[0].savings().dense

    def _tops(self, layers: Iterable[tuple[int, int, int]]) -> list[float]:
        return [self._top(m, n) for m, n, _ in layers]
