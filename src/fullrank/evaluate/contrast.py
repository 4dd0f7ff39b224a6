"""`contrast`: two systems query by query, and the queries on which they differ most."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fullrank.core.corpus import Queries
from fullrank.core.errors import InputError
from fullrank.core.table import Table


class QueryDifference(NamedTuple):
    """One query's value under two systems."""

    query: str
    base: float
    value: float

    @property
    def difference(self) -> float:
        """Value minus base."""
        return self.value - self.base


@dataclass(frozen=True)
class Contrast:
    """How one system differs from another, query by query.

    Attributes
    ----------
    wins, ties, losses
        Number of queries on which it is better, equal, worse.
    gains, drops
        The queries with the largest differences either way, largest first.
    """

    wins: int
    ties: int
    losses: int
    gains: tuple[QueryDifference, ...]
    drops: tuple[QueryDifference, ...]

    def table(self, queries: Queries | None = None) -> Table:
        """Return the largest gains and drops; with ``queries`` their texts are shown."""
        texts = queries or {}
        return Table(
            ["query", "base", "value", "difference"],
            [
                [texts.get(d.query, d.query), d.base, d.value, d.difference]
                for d in (*self.gains, *reversed(self.drops))
            ],
            title=f"{self.wins} wins, {self.ties} ties, {self.losses} losses",
            formats={"base": ".4f", "value": ".4f", "difference": "+.4f"},
        )


def contrast(
    values: Mapping[str, float],
    base: Mapping[str, float],
    *,
    top: int = 10,
    tolerance: float = 1e-9,
) -> Contrast:
    """Compare two systems query by query.

    Parameters
    ----------
    values, base
        Query id -> value, as :attr:`Evaluation.per_query` has them for a metric.
    top
        How many of the largest gains and drops to list.
    tolerance
        Differences up to it are ties.

    Raises
    ------
    InputError
        When the two are not of the same queries, or there are none.

    Examples
    --------
    >>> found = contrast({"q1": 1.0, "q2": 0.2, "q3": 0.5}, {"q1": 0.5, "q2": 0.3, "q3": 0.5})
    >>> found.wins, found.ties, found.losses, found.gains[0].query, found.drops[0].query
    (1, 1, 1, 'q1', 'q2')
    """
    if values.keys() != base.keys():
        odd = min(values.keys() ^ base.keys(), key=str)
        raise InputError(f"the two are not of the same queries: {odd!r} is in one only")
    if not values:
        raise InputError("there is no query to compare on")
    if top < 0:
        raise InputError(f"top is {top}; it must not be negative")
    rows = [QueryDifference(query, base[query], value) for query, value in values.items()]
    up = [row for row in rows if row.difference > tolerance]
    down = [row for row in rows if row.difference < -tolerance]
    return Contrast(
        wins=len(up),
        ties=len(rows) - len(up) - len(down),
        losses=len(down),
        gains=tuple(sorted(up, key=lambda row: -row.difference)[:top]),
        drops=tuple(sorted(down, key=lambda row: row.difference)[:top]),
    )
