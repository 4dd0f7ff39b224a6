"""One search, with everything there is to show about it."""

from __future__ import annotations

import sys
import threading
from time import perf_counter

from fullrank.core.errors import InputError
from fullrank.core.observe import observe_stages
from fullrank.core.run import Ranking, Run
from fullrank.serve.current import Current, Searchable, Served
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
    refresh
        Seconds between looks at whether others have changed the index.
    """

    def __init__(self, index: Searchable, concurrency: int = 1, refresh: float = 1.0) -> None:
        self._current = Current(index, refresh)
        self._threads = max(1, cpus() // concurrency)
        self._local = threading.local()

    @property
    def now(self) -> Served:
        """What is served; an answer is made from one of these, whatever changes meanwhile."""
        return self._current()

    def menu(self, now: Served) -> list[SystemInfo]:
        """Return the systems in the index's order, with what they rank by in a few words."""
        first = next(iter(now.index.encoders), None)
        return [_system_info(name, first) for name in now.systems]

    def search(self, query: str, k: int, system: str | None = None) -> SearchResponse:
        """Answer one query.

        Raises
        ------
        UnknownSystemError
            When the index has no such system.
        InputError
            When the query cannot be searched.
        StoreError
            When something that the system needs is not where it was.
        """
        self._share_cpu()
        now = self.now
        name = system or now.default
        if name not in now.systems:
            raise UnknownSystemError(
                f"no system {printable(name)[:80]!r}; there is {', '.join(now.systems)}"
            )
        query = printable(query).strip()
        if not query:
            raise InputError("the query is empty; give at least one word")
        begin = perf_counter()
        with observe_stages() as stages:
            run = now.index.search(query, k, system=name)
        ranking = _ranking(run.top(k))
        scores = _stage_scores(
            [*stages, (run.trace[-1].stage if run.trace else name, run)], ranking
        )
        searched = perf_counter()
        documents = ranking.ids.tolist()
        snippets = now.index.snippets(query, documents, system=name) if documents else ()
        results = [
            Result(
                rank=rank,
                id=printable(document),
                title=printable(now.corpus[document].title),
                snippet=_snippet(snippets[rank - 1]),
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

    def _share_cpu(self) -> None:
        # torch takes all cores for every thread that calls it, and threads that search at the
        # same time would then fight for them. Its setting belongs to the calling thread.
        torch = sys.modules.get("torch")
        if torch is not None and not getattr(self._local, "shared", False):
            torch.set_num_threads(self._threads)
            self._local.shared = True


def _snippet(found: str) -> Snippet:
    text = printable(found[:_MAX_SNIPPET])
    ranges = [(a, b) for a, b in getattr(found, "highlights", ()) if b <= len(text)]
    if len(found) > len(text):
        text += "…"
    return Snippet(text=text, highlights=ranges)


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
