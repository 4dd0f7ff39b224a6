"""`Run`: what was ranked, for whom, how."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import check_id
from fullrank.core.errors import InputError, require
from fullrank.core.files import atomic_write

Scores = npt.NDArray[np.float64]
Ids = npt.NDArray[np.object_]


class StageTrace(NamedTuple):
    """One stage a run went through: its name and how long it took."""

    stage: str
    milliseconds: float


@dataclass(frozen=True, slots=True)
class Ranking:
    """The answer to one query: item ids, best first, and their scores."""

    ids: Ids
    scores: Scores

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[tuple[str, float]]:
        return zip(self.ids.tolist(), self.scores.tolist(), strict=True)


def strictly_decreasing(scores: Scores) -> Scores:
    """Lower scores by as little as needed so that they fall strictly, even in float32.

    trec_eval and its descendants read scores as 32-bit floats and break ties by item id, so a
    ranking whose scores tie in float32 would be measured in another order than it was shown.

    >>> strictly_decreasing(np.array([2.0, 2.0, 1.0])).tolist()
    [2.0, 1.9999998807907104, 1.0]
    """
    with np.errstate(over="ignore"):
        out = scores.astype(np.float32)
    limits = np.finfo(np.float32)
    np.clip(out, limits.min / 2, limits.max / 2, out=out)
    # Denormal numbers are all zero to a process that flushes them, so none may be left.
    out[np.abs(out) < limits.tiny] = 0.0
    for i in np.flatnonzero(out[1:] >= out[:-1]) + 1:
        j = i
        while j < len(out) and out[j] >= out[j - 1]:
            below = min(np.nextafter(out[j - 1], np.float32(-np.inf)), out[j - 1] - limits.tiny)
            out[j] = below if abs(below) >= limits.tiny else 0.0
            j += 1
    return out.astype(np.float64)


def _ranking(query: str, ids: Iterable[str], scores: Iterable[float], ordered: bool) -> Ranking:
    """Check one query's answer and put it in order."""
    id_list = list(ids)
    for identifier in (query, *id_list):
        if not isinstance(identifier, str):
            raise InputError(
                f"query {query!r}: the id {identifier!r} is a {type(identifier).__name__}; "
                "ids are strings"
            )
    columns = np.empty(len(id_list), dtype=object)
    columns[:] = id_list
    # A copy: what is frozen below must not be the caller's own array.
    try:
        values = np.array(scores if isinstance(scores, np.ndarray) else list(scores), np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"query {query!r}: its scores are not numbers: {error}") from None
    if values.shape != columns.shape:
        raise InputError(f"query {query!r}: {len(columns)} items but {values.size} scores")
    if not np.isfinite(values).all():
        bad = columns[int(np.flatnonzero(~np.isfinite(values))[0])]
        raise InputError(f"query {query!r}: the score of item {bad!r} is not a finite number")
    if len(set(id_list)) != len(id_list):
        seen: set[str] = set()
        twice = next(i for i in id_list if i in seen or seen.add(i))  # type: ignore[func-returns-value]
        raise InputError(f"query {query!r}: item {twice!r} is ranked twice")
    if not ordered:
        by_id = np.argsort(columns, kind="stable")[::-1]
        order = by_id[np.argsort(-values[by_id], kind="stable")]
        columns, values = columns[order], values[order]
    columns.setflags(write=False)
    values.setflags(write=False)
    return Ranking(columns, values)


def tie_ranks(items: Sequence[str] | Ids) -> npt.NDArray[np.int64]:
    """Position of each item in id order: what :meth:`Run.from_matrix` breaks ties by."""
    order = np.argsort(np.asarray(items, dtype=object), kind="stable")
    ranks = np.empty(len(order), dtype=np.int64)
    ranks[order] = np.arange(len(order))
    return ranks


class Run(Mapping[str, Ranking]):
    """Rankings for a set of queries: query id -> (item ids, float64 scores), best first.

    The order is the truth. Building a run from scores sorts them, ties by item id descending as
    ``trec_eval`` does; building one from rankings (``ordered=True``) keeps the order that a
    reranker decided on, whatever its scores. Exporting makes scores strictly decreasing, so that
    what is shown is what is measured.

    Parameters
    ----------
    rankings
        Query id -> ``(ids, scores)``. A query without results is an empty pair.
    name
        Shown in tables; the tag of a TREC file.
    trace
        The stages it went through, oldest first.
    ordered
        Whether the ids already stand in their final order.

    Raises
    ------
    InputError
        On scores that are not finite, an item ranked twice for a query, or lengths that differ.

    Examples
    --------
    >>> run = Run.from_dict({"q1": {"a": 1.0, "b": 2.0, "c": 1.0}}, name="toy")
    >>> list(run["q1"])
    [('b', 2.0), ('c', 1.0), ('a', 1.0)]
    >>> run.top(1).to_dict()
    {'q1': {'b': 2.0}}
    """

    def __init__(
        self,
        rankings: Mapping[str, tuple[Iterable[str], Iterable[float]]],
        *,
        name: str = "run",
        trace: Sequence[StageTrace] = (),
        ordered: bool = False,
    ) -> None:
        self.name = name
        self.trace = tuple(trace)
        self._rankings = {
            q: _ranking(q, ids, scores, ordered) for q, (ids, scores) in rankings.items()
        }

    # -- reading ---------------------------------------------------------------------------

    @classmethod
    def from_dict(cls, scores: Mapping[str, Mapping[str, float]], *, name: str = "run") -> Run:
        """Build a run from ``{query: {item: score}}``, the shape most libraries pass around."""
        return cls({q: (list(s), list(s.values())) for q, s in scores.items()}, name=name)

    @classmethod
    def from_frame(cls, frame: Any, *, name: str = "run") -> Run:
        """Build a run from a data frame with columns ``qid``, ``docno`` and ``score``.

        These are PyTerrier's names; ``query_id`` and ``doc_id`` (ir-measures) work too. Ids are
        read as text, so that the rows of query 1 and of query "1" are of one query.

        Raises
        ------
        InputError
            On a frame without these columns or with a row that lacks an id, and as for
            :class:`Run`.
        """
        renamed = frame.rename(columns={"query_id": "qid", "doc_id": "docno"})
        missing = {"qid", "docno", "score"} - set(renamed.columns)
        if missing:
            raise InputError(
                f"the frame lacks {sorted(missing)}; it has {sorted(map(str, frame.columns))}"
            )
        for column in ("qid", "docno"):
            if absent := int(renamed[column].isna().sum()):
                raise InputError(f"the column {column!r} of the frame lacks {absent} of its ids")
        return cls(
            {
                q: (rows["docno"].astype(str).tolist(), rows["score"].to_numpy(np.float64))
                for q, rows in renamed.groupby(renamed["qid"].astype(str), sort=False)
            },
            name=name,
        )

    @classmethod
    def from_trec(cls, path: str | Path) -> Run:
        """Read a TREC run file (``qid Q0 docid rank score tag``); the rank column is ignored.

        Raises
        ------
        InputError
            On a line of another shape, naming it; a score that is not finite, or an item ranked
            twice for a query.
        """
        scores: dict[str, tuple[list[str], list[float]]] = {}
        tag = Path(path).stem
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:  # bytes that are not UTF-8 raise a ValueError too
                    text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                    query, _, item, _, score, tag = text.split()
                    value = float(score)
                except ValueError:
                    raise InputError(
                        f"{path}, line {number}: expected 'qid Q0 docid rank score tag' in UTF-8, "
                        f"found {line.decode(errors='replace').rstrip()[:80]!r}"
                    ) from None
                ids, values = scores.setdefault(query, ([], []))
                ids.append(item)
                values.append(value)
        try:
            return cls(scores, name=tag)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    @classmethod
    def from_matrix(
        cls,
        queries: Sequence[str],
        items: Ids,
        rows: npt.NDArray[np.integer[Any]],
        scores: npt.NDArray[np.floating[Any]],
        *,
        tie_rank: npt.NDArray[np.integer[Any]],
        name: str = "run",
        trace: Sequence[StageTrace] = (),
    ) -> Run:
        """Build a run from a retriever's top-k matrices, without a Python loop over items.

        Parameters
        ----------
        queries
            Q query ids.
        items
            N item ids, as an object array; shared by all queries.
        rows
            (Q, k) positions in ``items``; ``-1`` pads a query with fewer results.
        scores
            (Q, k), finite where ``rows`` is not ``-1``; anything else raises
            :class:`~fullrank.core.InputError`.
        tie_rank
            (N,) position of each item when all are sorted by id (see :func:`tie_ranks`).
        name, trace
            As for :class:`Run`.
        """
        values = scores.astype(np.float64)
        absent = rows < 0
        if not (sound := np.isfinite(values) | absent).all():
            bad = queries[int(np.argmin(sound.all(axis=1)))]
            raise InputError(f"query {bad!r}: a score is not a finite number")
        ranks = np.where(absent, -1, tie_rank[rows])
        order = np.lexsort((-ranks, -np.where(absent, -np.inf, values)), axis=-1)
        ids = items[np.take_along_axis(rows, order, axis=-1)]
        values = np.take_along_axis(values, order, axis=-1)
        ids.setflags(write=False)
        values.setflags(write=False)
        kept = rows.shape[1] - absent.sum(axis=1)
        run = cls({}, name=name, trace=trace)
        run._rankings = {
            q: Ranking(ids[i, :n], values[i, :n])
            for i, (q, n) in enumerate(zip(queries, kept.tolist(), strict=True))
        }
        return run

    # -- writing ---------------------------------------------------------------------------

    def to_dict(self, *, strict: bool = False) -> dict[str, dict[str, float]]:
        """``{query: {item: score}}``; with ``strict``, scores fall strictly in each query."""
        return {
            q: dict(
                zip(
                    r.ids.tolist(),
                    (strictly_decreasing(r.scores) if strict else r.scores).tolist(),
                    strict=True,
                )
            )
            for q, r in self._rankings.items()
        }

    def to_frame(self) -> Any:
        """Return a pandas frame in PyTerrier's columns: qid, docno, score, rank (from 0).

        Scores fall strictly in each query, so that who sorts by them finds the run's order.
        """
        pandas = require("pandas", extra="search")
        rows = [
            (query, item, score, rank)
            for query, scores in self.to_dict(strict=True).items()
            for rank, (item, score) in enumerate(scores.items())
        ]
        return pandas.DataFrame(rows, columns=["qid", "docno", "score", "rank"])

    def to_trec(self, path: str | Path) -> Path:
        """Write a TREC run file, whole or not at all; scores are strictly decreasing.

        Raises
        ------
        InputError
            On an id that is empty or holds white space, which separates the file's columns; on
            half of a surrogate pair, which no UTF-8 file holds.
        """
        for query in self:
            check_id(query, "query")
        for item in {item for ranking in self.values() for item in ranking.ids.tolist()}:
            check_id(item, "item")
        tag = "_".join(self.name.split()) or "run"
        lines = (
            f"{query} Q0 {item} {rank} {score!r} {tag}\n"
            for query, scores in self.to_dict(strict=True).items()
            for rank, (item, score) in enumerate(scores.items(), 1)
        )
        try:
            written = "".join(lines).encode()
        except UnicodeEncodeError as error:
            line = error.object[: error.end].count("\n")
            raise InputError(
                f"half of a surrogate pair is in an id or the name of the run and cannot be "
                f"written: {error.object.splitlines()[line]!r}"
            ) from None
        return atomic_write(path, written)

    # -- working with it -------------------------------------------------------------------

    def __getitem__(self, query: str) -> Ranking:
        return self._rankings[query]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rankings)

    def __len__(self) -> int:
        return len(self._rankings)

    def __repr__(self) -> str:
        return f"Run({self.name!r}, {len(self)} queries)"

    def __eq__(self, other: object) -> bool:
        """Two runs are equal when they rank the same items in the same order, equally scored."""
        if not isinstance(other, Run):
            return NotImplemented
        return self._rankings.keys() == other._rankings.keys() and all(
            np.array_equal(r.ids, other[q].ids) and np.array_equal(r.scores, other[q].scores)
            for q, r in self._rankings.items()
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def milliseconds(self) -> float:
        """Time spent in all stages together."""
        return math.fsum(stage.milliseconds for stage in self.trace)

    def _derived(self, rankings: dict[str, Ranking], **changes: Any) -> Run:
        # What comes from a run is already checked and ordered.
        run = Run({}, name=changes.get("name", self.name), trace=changes.get("trace", self.trace))
        run._rankings = rankings
        return run

    def top(self, k: int) -> Run:
        """Keep the best ``k`` items of every query (``k >= 1``)."""
        if k < 1:
            raise InputError(f"k is {k}; a ranking keeps at least one item")
        return self._derived(
            {q: Ranking(r.ids[:k], r.scores[:k]) for q, r in self._rankings.items()}
        )

    def select(self, queries: Iterable[str]) -> Run:
        """Keep these queries, in the order given; one that is absent here is left out."""
        return self._derived({q: r for q in queries if (r := self._rankings.get(q)) is not None})

    def drop(self, items: Mapping[str, Iterable[str]]) -> Run:
        """Remove items from the rankings of some queries, e.g. a query's own document."""
        out: dict[str, Ranking] = {}
        for q, r in self._rankings.items():
            unwanted = set(items.get(q, ()))
            keep = np.array([i not in unwanted for i in r.ids], dtype=bool)
            ids, scores = r.ids[keep], r.scores[keep]
            ids.setflags(write=False)
            scores.setflags(write=False)
            out[q] = Ranking(ids, scores)
        return self._derived(out)

    def named(self, name: str) -> Run:
        """Return the same run under another name."""
        return self._derived(self._rankings, name=name)

    def traced(self, stage: str, milliseconds: float, before: Sequence[StageTrace] = ()) -> Run:
        """Return the same run with ``before`` and then this stage as its trace."""
        return self._derived(self._rankings, trace=(*before, StageTrace(stage, milliseconds)))
