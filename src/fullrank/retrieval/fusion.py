"""Combining runs: reciprocal ranks, weighted sums, sets.

Runs are laid out as flat columns first, so that thousands of queries are fused by a handful of
array operations. Whatever the order in which runs are given, the result is the same to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError
from fullrank.core.run import Ids, Run, Scores

Normalise: TypeAlias = Literal["minmax", "zscore"]
Rows: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Column:
    """One run, flat: a row for every ranked item, query by query, best first."""

    lengths: Rows
    query: Rows
    item: Rows
    score: Scores

    @property
    def rank(self) -> Rows:
        """Position of each row in its ranking, from 0."""
        starts = np.cumsum(self.lengths) - self.lengths
        return np.arange(len(self.query)) - np.repeat(starts, self.lengths)

    def by_query(self, reduce: np.ufunc, values: Scores) -> Scores:
        """Reduce the rows of each query to one value, and repeat it for its rows."""
        kept = self.lengths[self.lengths > 0]
        return np.repeat(reduce.reduceat(values, np.cumsum(kept) - kept), kept)


@dataclass(frozen=True, slots=True)
class _Table:
    """Several runs over one numbering of queries, and of items by falling id."""

    queries: list[str]
    items: Ids
    columns: list[_Column]


def _lay_out(runs: Sequence[Run]) -> _Table:
    queries = list(dict.fromkeys(q for run in runs for q in run))
    found = [[run.get(q) for q in queries] for run in runs]
    listed = [[i for r in rankings if r for i in r.ids.tolist()] for rankings in found]
    names = sorted(set().union(*listed), reverse=True)
    number = {name: i for i, name in enumerate(names)}
    columns = []
    for rankings, ids in zip(found, listed, strict=True):
        lengths = np.array([0 if r is None else len(r) for r in rankings], dtype=np.int64)
        scores = [r.scores for r in rankings if r]
        columns.append(
            _Column(
                lengths,
                np.repeat(np.arange(len(queries)), lengths),
                np.fromiter(map(number.__getitem__, ids), np.int64, len(ids)),
                np.concatenate(scores) if scores else np.empty(0),
            )
        )
    items = np.empty(len(names), dtype=object)
    items[:] = names
    return _Table(queries, items, columns)


def _total(table: _Table, values: Sequence[npt.NDArray[np.floating[Any]]], name: str) -> Run:
    """Sum what each run gives an item, and rank by the sums."""
    width = max(len(table.items), 1)
    keys = np.concatenate([c.query * width + c.item for c in table.columns])
    parts = np.concatenate(values)
    # Of two numbers the sum is the same either way; more are added by rising value.
    order = np.argsort(keys) if len(values) <= 2 else np.lexsort((parts, keys))
    keys, parts = keys[order], parts[order]
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    scores = np.add.reduceat(parts, first) if len(first) else parts
    query, item = np.divmod(keys[first], width)
    ends = np.searchsorted(query, np.arange(len(table.queries) + 1)).tolist()
    rankings = {}
    for i, q in enumerate(table.queries):
        mine, ids = scores[ends[i] : ends[i + 1]], item[ends[i] : ends[i + 1]]
        # Items stand by falling id, and a stable sort leaves equal scores so.
        best = np.argsort(-mine, kind="stable")
        rankings[q] = (table.items[ids[best]], mine[best])
    return Run(rankings, name=name, ordered=True)


def fuse_ranks(runs: Sequence[Run], k: float = 60) -> Run:
    """Reciprocal rank fusion: an item's score is the sum of ``1 / (k + rank)``, ranks from 1.

    Parameters
    ----------
    runs
        One or more; a query that some lack is fused from the others.
    k
        How little the first ranks stand out; 60 in the original paper (Cormack et al., 2009).

    Examples
    --------
    >>> a = Run({"q": (["x", "y"], [9.0, 8.0])})
    >>> b = Run({"q": (["y", "z"], [0.2, 0.1])})
    >>> fuse_ranks([a, b])["q"].ids.tolist()
    ['y', 'x', 'z']
    """
    if not k >= 0 or not np.isfinite(k):
        raise InputError(f"k of reciprocal rank fusion is {k}; it is a number of at least 0")
    table = _lay_out(runs)
    return _total(table, [1.0 / (k + 1 + c.rank) for c in table.columns], "rrf")


def fuse_scores(
    runs: Sequence[Run], weights: Sequence[float], normalise: Normalise | None = None
) -> Run:
    """Weighted sum of scores; what a run lacks gets 0 from it.

    Parameters
    ----------
    runs
        One or more.
    weights
        One a run.
    normalise
        ``"minmax"`` maps each query's scores in each run to [0, 1]; where all are equal, to 1.
        ``"zscore"`` divides them by their standard deviation and puts the lowest at 0, so that
        an item which a run lacks counts as its worst (ranking as z-scores do whose gaps are
        filled with the lowest one). None takes them as they are.

    Examples
    --------
    >>> a = Run({"q": (["x", "y"], [30.0, 10.0])})
    >>> b = Run({"q": (["y", "z"], [0.9, 0.5])})
    >>> fuse_scores([a, b], [0.4, 0.6], "minmax").to_dict()
    {'q': {'y': 0.6, 'x': 0.4, 'z': 0.0}}
    """
    check_weights(len(runs), weights, normalise)
    table = _lay_out(runs)
    values = [
        _normalised(column, normalise) * weight
        for weight, column in zip(weights, table.columns, strict=True)
    ]
    return _total(table, values, "weighted")


def check_weights(count: int, weights: Sequence[float], normalise: Normalise | None) -> None:
    """Raise unless there is a finite weight for each of ``count`` runs, and the rule is known."""
    if len(weights) != count:
        raise InputError(f"{count} things to fuse but {len(weights)} weights; give one each")
    if not np.isfinite(np.asarray(weights, dtype=np.float64)).all():
        raise InputError(f"weights {list(weights)} hold something that is not a finite number")
    if normalise not in ("minmax", "zscore", None):
        raise InputError(f"normalise is {normalise!r}; it is 'minmax', 'zscore' or None")


def _normalised(column: _Column, how: Normalise | None) -> Scores:
    if how is None or not len(column.score):
        return column.score
    above = column.score - column.by_query(np.minimum, column.score)
    if how == "minmax":
        spread = column.by_query(np.maximum, above)
        return np.divide(above, spread, out=np.ones_like(above), where=spread > 0)
    count = np.repeat(column.lengths, column.lengths)
    centred = above - column.by_query(np.add, above) / count
    deviation = np.sqrt(column.by_query(np.add, centred**2) / count)
    return np.divide(above, deviation, out=np.zeros_like(above), where=deviation > 0)


def intersect(runs: Sequence[Run]) -> Run:
    """Items that two runs hold, in the first one's order; scores are 0, as none are defined."""
    a, b = runs
    kept = {}
    for query in a:
        other = set(b[query].ids) if query in b else set()
        kept[query] = [i for i in a[query].ids.tolist() if i in other]
    return _unscored({**kept, **{q: [] for q in b if q not in a}}, "&")


def unite(runs: Sequence[Run]) -> Run:
    """Items of either of two runs: the first's, then what the second adds; scores are 0."""
    return _unscored(
        {
            q: list(dict.fromkeys(i for run in runs if q in run for i in run[q].ids.tolist()))
            for q in dict.fromkeys(q for run in runs for q in run)
        },
        "|",
    )


def _unscored(items: dict[str, list[str]], name: str) -> Run:
    return Run({q: (ids, np.zeros(len(ids))) for q, ids in items.items()}, name=name, ordered=True)
