"""One search, with everything there is to show about it."""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from time import perf_counter
from typing import Protocol

from fullrank.core.corpus import Corpus
from fullrank.core.errors import InputError
from fullrank.core.observe import observe_stages
from fullrank.core.run import Ranking, Run
from fullrank.serve.limits import cpus
from fullrank.serve.models import Result, SearchResponse, Snippet, StageTime, SystemInfo

_MAX_SNIPPET = 600
_KINDS = {
    "bm25": "words in common (BM25)",
    "dense": "closeness of meaning (vectors)",
    "rrf": "words and meaning, fused by reciprocal rank",
    "weighted": "words and meaning, fused by weighted scores",
    "feedback": "what fusion found, reranked towards what the best have in common",
}


class Searchable(Protocol):
    """What can be served: :class:`fullrank.retrieval.Index` is one."""

    @property
    def corpus(self) -> Corpus:
        """The documents."""

    @property
    def systems(self) -> Mapping[str, object]:
        """What can be searched with, by name: ``KIND`` or ``KIND:ENCODER``."""

    @property
    def encoders(self) -> Mapping[str, object]:
        """The encoders by name; systems that name none use the first."""

    @property
    def default_system(self) -> str:
        """The system used when none is named."""

    def search(self, query: str, k: int, *, system: str) -> Run:
        """Return the best ``k`` documents for one query, with a trace of the stages."""

    def snippet(self, query: str, document: str, *, system: str) -> str:
        """Return the part of a document that answers the query.

        The string may carry ``highlights``: disjoint ranges ``(start, stop)`` of the query's
        words in it, in order.
        """


class UnknownSystemError(Exception):
    """A system that the index does not have."""


def printable(text: str) -> str:
    r"""Replace what UTF-8 cannot carry (lone surrogates), so that it can be sent.

    >>> printable("a\ud800b")
    'a?b'
    """
    return text.encode("utf-8", "replace").decode("utf-8")


class Searcher:
    """Searches an index and reports the scores and times of every stage.

    Parameters
    ----------
    index
        What is searched.
    concurrency
        How many threads search at a time: each gets its share of the CPU.
    """

    def __init__(self, index: Searchable, concurrency: int = 1) -> None:
        self.index = index
        self.corpus = index.corpus
        self.systems = tuple(index.systems)
        if not self.systems:
            raise InputError("the index has no system to search with")
        self.default = index.default_system
        if self.default not in self.systems:
            raise InputError(f"the default system {self.default!r} is none of {self.systems}")
        self._threads = max(1, cpus() // concurrency)
        self._local = threading.local()

    def menu(self) -> list[SystemInfo]:
        """Return the systems in the index's order, with what they rank by in a few words."""
        first = next(iter(self.index.encoders), None)
        return [_system_info(name, first) for name in self.systems]

    def search(self, query: str, k: int, system: str | None = None) -> SearchResponse:
        """Answer one query.

        Raises
        ------
        UnknownSystemError
            When the index has no such system.
        InputError
            When the query cannot be searched.
        """
        name = system or self.default
        if name not in self.systems:
            raise UnknownSystemError(
                f"no system {printable(name)[:80]!r}; there is {', '.join(self.systems)}"
            )
        query = printable(query).strip()
        if not query:
            raise InputError("the query is empty; give at least one word")
        self._share_cpu()
        begin = perf_counter()
        with observe_stages() as stages:
            run = self.index.search(query, k, system=name)
        ranking = _ranking(run.top(k))
        scores = _stage_scores(
            [*stages, (run.trace[-1].stage if run.trace else name, run)], ranking
        )
        searched = perf_counter()
        results = [
            Result(
                rank=rank,
                id=printable(document),
                title=printable(self.corpus[document].title),
                snippet=self._snippet(query, document, name),
                score=score,
                scores={stage: column[rank - 1] for stage, column in scores.items()},
            )
            for rank, (document, score) in enumerate(ranking, 1)
        ]
        end = perf_counter()
        times = [StageTime(stage=t.stage, milliseconds=t.milliseconds) for t in run.trace]
        times.append(StageTime(stage="snippets", milliseconds=(end - searched) * 1e3))
        return SearchResponse(
            query=query,
            system=name,
            k=k,
            milliseconds=(end - begin) * 1e3,
            stages=times,
            results=results,
        )

    def _snippet(self, query: str, document: str, system: str) -> Snippet:
        found = self.index.snippet(query, document, system=system)
        text = printable(found[:_MAX_SNIPPET])
        ranges = [(a, b) for a, b in getattr(found, "highlights", ()) if b <= len(text)]
        if len(found) > len(text):
            text += "…"
        return Snippet(text=text, highlights=ranges)

    def _share_cpu(self) -> None:
        # torch takes all cores for every thread that calls it, and threads that search at the
        # same time would then fight for them. Its setting belongs to the calling thread.
        torch = sys.modules.get("torch")
        if torch is not None and not getattr(self._local, "shared", False):
            torch.set_num_threads(self._threads)
            self._local.shared = True


def _system_info(name: str, first_encoder: str | None) -> SystemInfo:
    kind, _, encoder = name.partition(":")
    uses = None if kind == "bm25" else encoder or first_encoder
    return SystemInfo(name=name, kind=kind, encoder=uses, description=_KINDS.get(kind, kind))


def _ranking(run: Run) -> Ranking:
    for ranking in run.values():
        return ranking
    return Run({"none": ((), ())})["none"]


def _stage_scores(stages: list[tuple[str, Run]], shown: Ranking) -> dict[str, list[float | None]]:
    """Score that every stage gave each shown document; None where it did not return it.

    A stage that only cuts its input repeats its scores, and is left out.
    """
    columns: dict[str, list[float | None]] = {}
    for name, run in stages:
        known = dict(_ranking(run))
        column = [known.get(document) for document in shown.ids.tolist()]
        if column in columns.values():
            continue
        label, number = name, 2
        while label in columns:
            label, number = f"{name} ({number})", number + 1
        columns[label] = column
    return columns
