"""The systems of an index: ready-made pipelines over its retrievers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from pydantic import ValidationError

from fullrank.core.corpus import Corpus, Queries
from fullrank.core.errors import InputError
from fullrank.core.run import Run
from fullrank.retrieval.index_filters import Mask
from fullrank.retrieval.index_manifest import Settings
from fullrank.retrieval.index_view import View
from fullrank.retrieval.retriever import RetrieverStage, check_depth
from fullrank.retrieval.stages import Stage, rrf, weighted

# In the order of menus: how a system is made of retrievers.
KINDS = ("bm25", "dense", "rrf", "weighted", "feedback")


def system_names(encoders: list[str]) -> list[str]:
    """Name the systems of an index, in the order of menus.

    >>> system_names(["base"])
    ['bm25', 'dense', 'rrf', 'weighted', 'feedback']
    >>> system_names(["base", "tuned"])[:4]
    ['bm25', 'dense:base', 'dense:tuned', 'rrf:base']
    """
    if len(encoders) == 1:
        return list(KINDS)
    return ["bm25", *(f"{kind}:{name}" for kind in KINDS[1:] for name in encoders)]


def checked_settings(settings: Mapping[str, Any] | Settings, encoders: list[str]) -> Settings:
    """Return settings, or say which of them cannot be.

    Raises
    ------
    InputError
        For an unknown setting, a value out of range, a default system that is not there.
    """
    values = settings.model_dump() if isinstance(settings, Settings) else dict(settings)
    try:
        checked = Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        known = ", ".join(Settings.model_fields)
        raise InputError(f"setting {name!r}: {first['msg']}; settings are {known}") from error
    names = system_names(encoders)
    if checked.default_system is not None and checked.default_system not in names:
        raise InputError(f"default_system {checked.default_system!r} is none of {', '.join(names)}")
    return checked


def parse_system(name: str, view: View) -> tuple[str, str]:
    """Return kind and encoder of a system.

    Raises
    ------
    InputError
        For a name that no system of this index has.
    """
    encoders = list(view.encoders)
    known = system_names(encoders)
    if name not in known:
        raise InputError(f"there is no system {name!r} in this index; there is {', '.join(known)}")
    kind, _, encoder = name.partition(":")
    return kind, encoder or (encoders[0] if encoders else "")


def default_system(view: View) -> str:
    """Return what answers when no system is asked for."""
    names = system_names(list(view.encoders))
    chosen = view.manifest.settings.default_system
    if chosen in names:
        return str(chosen)
    return next((name for name in names if name.startswith("rrf")), names[0])


def make_system(
    name: str, view: View, *, depth: int | None = None, mask: Mask | None = None
) -> Stage:
    """Compose a system; what it needs is loaded when it first ranks.

    Parameters
    ----------
    name
        One of :func:`system_names`.
    view
        What it searches.
    depth
        Results that each retriever hands on; the setting of the index by default.
    mask
        ``(N,)`` which documents may be found; all by default.
    """
    kind, encoder = parse_system(name, view)
    settings = view.manifest.settings
    depth = depth or settings.depth
    lexical = _retriever("bm25", view.bm25, depth, view, mask)
    if kind == "bm25":
        return lexical
    dense = _retriever("dense", partial(view.dense, encoder), depth, view, mask)
    if kind == "dense":
        return dense.named(name)
    if kind == "weighted":
        return weighted(lexical, dense, weights=settings.weights).named(name)
    if kind == "rrf":
        return rrf(lexical, dense, k=settings.rrf_k).named(name)
    before = settings.feedback_first + name.removeprefix(kind)
    first = make_system(before, view, depth=depth, mask=mask)
    return (first % depth >> LazyStage(kind, partial(_feedback, view, encoder, depth))).named(name)


def _feedback(view: View, encoder: str, depth: int) -> Stage:
    settings = view.manifest.settings
    reranker: Stage = view.feedback(encoder).having(
        weight=settings.feedback_weight,
        feedback=settings.feedback_documents,
        weighting=settings.feedback_weighting,
        depth=depth,
    )
    return reranker


def load_for(name: str, view: View) -> None:
    """Load what a system needs, so that the time of its stages is that of ranking."""
    kind, encoder = parse_system(name, view)
    if kind != "dense":
        view.bm25()
    if kind != "bm25":
        view.dense(encoder)
    if kind == "feedback":
        view.feedback(encoder)


def best_parts(
    name: str, view: View, query: str, documents: Sequence[str]
) -> list[tuple[int, int] | None]:
    """Return where in the contents of documents a system found a query: each one's best passage.

    None stands for a document of one passage, and for all where no encoder is at work.
    """
    kind, encoder = parse_system(name, view)
    found: dict[int, tuple[int, int]] = {}
    rows = [view.corpus.row(document) for document in documents]
    if kind != "bm25" and query.strip():
        passages, _ = view.passages(encoder)
        several = [row for row in rows if passages.of(row).stop - passages.of(row).start > 1]
        # The query's vector is looked up once, not once a document.
        best = view.dense(encoder).best_passages(query, several) if several else []
        for row, passage in zip(several, best, strict=True):
            found[row] = int(passages.start[passage]), int(passages.stop[passage])
    return [found.get(row) for row in rows]


def _retriever(
    name: str, load: Callable[[], RetrieverStage], depth: int, view: View, mask: Mask | None
) -> RetrieverStage:
    stage = LazyRetriever(name, load, depth, view.corpus)
    return stage if mask is None else FilteredRetriever(stage, mask, view.corpus)


class LazyStage(Stage):
    """A stage that is made when it first ranks."""

    def __init__(self, name: str, load: Callable[[], Stage]) -> None:
        self.name, self._load = name, load

    def transform(self, queries: Queries, run: Run | None, corpus: Corpus | None) -> Run:
        """Make the stage if need be, and rank."""
        return self._load().transform(queries, run, corpus)


class LazyRetriever(RetrieverStage):
    """A retriever that is loaded when it first searches."""

    def __init__(
        self, name: str, load: Callable[[], RetrieverStage], depth: int, corpus: Corpus
    ) -> None:
        self.name, self._load, self.depth, self.corpus = name, load, depth, corpus

    def search(self, queries: Queries, k: int | None = None) -> Run:
        """Return the best ``k`` items of every query, ``depth`` by default."""
        return self._load().search(queries, self.depth if k is None else k)

    def rescore(self, queries: Queries, run: Run) -> Run:
        """Score the items of a run."""
        return self._load().rescore(queries, run)


class FilteredRetriever(RetrieverStage):
    """A retriever that finds only some of the documents.

    It asks for more results until enough of them pass, so that a filter costs little when it lets
    much through, and never hides a document that should have been found.
    """

    def __init__(self, inner: RetrieverStage, mask: Mask, corpus: Corpus) -> None:
        self.name, self.depth, self.corpus = inner.name, inner.depth, corpus
        self._inner, self._mask, self._documents = inner, mask, corpus
        self._passing = int(np.count_nonzero(mask))

    def search(self, queries: Queries, k: int | None = None) -> Run:
        """Return the best ``k`` items that pass, for every query."""
        wanted = min(check_depth(self.depth if k is None else k), self._passing)
        if not wanted:
            return Run({query: ([], []) for query in queries}, name=self.name)
        done: dict[str, Run] = {}
        left = dict(queries)
        depth = math.ceil(1.5 * wanted * len(self._mask) / self._passing)
        while left:
            depth = min(depth, len(self._mask))
            exhausted = depth == len(self._mask)
            found = self._inner.search(left, depth)
            kept = self._filtered(found).top(wanted)
            for query in list(left):
                # Enough passed, or there is nothing more to be found.
                if exhausted or len(kept[query]) >= wanted or len(found[query]) < depth:
                    done[query] = kept
                    del left[query]
            depth *= 4
        rankings = {query: (done[query][query].ids, done[query][query].scores) for query in queries}
        return Run(rankings, name=self.name, ordered=True)

    def rescore(self, queries: Queries, run: Run) -> Run:
        """Score the items of a run that pass; others go."""
        return self._inner.rescore(queries, self._filtered(run))

    def _filtered(self, run: Run) -> Run:
        row = self._documents.row
        return run.drop(
            {q: [i for i in run[q].ids.tolist() if not self._mask[row(i)]] for q in run}
        )
