"""The demo's systems: what is compared on the judged queries, and how it is put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fullrank.core.corpus import Corpus, Queries
from fullrank.core.run import Run
from fullrank.datasets import Dataset
from fullrank.evaluate import evaluate
from fullrank.retrieval import (
    BM25,
    Dense,
    Encoder,
    PseudoQueryReranker,
    Stage,
    rrf,
    tune_feedback,
    weighted,
)

DEPTH = 100
_WEIGHTS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Settings:
    """What was chosen on the development queries."""

    dense_weight: float
    feedback_weight: float
    feedback_documents: int

    @property
    def weights(self) -> tuple[float, float]:
        """Of BM25 and of the dense ranking, in the weighted fusion."""
        return round(1 - self.dense_weight, 3), self.dense_weight


class Pipelines:
    """Builds systems over one corpus in which a query never meets its own document.

    A query is the first line of a document. That document is dropped behind each retriever,
    before anything is fused or fed back, so that no system profits from it.

    Parameters
    ----------
    data
        The collection.
    """

    def __init__(self, data: Dataset) -> None:
        self.data = data
        self._exclude = data.exclude
        self._spare = max(map(len, data.exclude.values()), default=0)
        self.bm25 = self._without_own(BM25(data.corpus, depth=DEPTH + self._spare))

    def _without_own(self, stage: Stage) -> Stage:
        def drop(_: Queries, run: Run | None, __: Corpus | None) -> Run:
            assert run is not None
            return run.drop(self._exclude)

        return ((stage >> drop) % DEPTH).named(stage.name)

    def dense(self, encoder: Encoder, vectors: Any) -> tuple[Stage, Dense]:
        """Return the dense system, and the retriever inside it."""
        dense = Dense(
            self.data.corpus,
            encoder,
            vectors=vectors,
            passages=False,
            depth=DEPTH + self._spare,
        )
        return self._without_own(dense), dense

    def tune(self, encoder: Encoder, vectors: Any, dev: Dataset) -> Settings:
        """Choose the weights of fusion and feedback on the development queries."""
        stage, dense = self.dense(encoder, vectors)
        measure = _metric(dev)
        lexical, semantic = self.bm25(dev.queries), stage(dev.queries)
        values = [measure(weighted(lexical, semantic, weights=[1 - w, w])) for w in _WEIGHTS]
        reranker = PseudoQueryReranker.from_dense(dense, depth=DEPTH)
        choice = tune_feedback(
            reranker, dev.queries, semantic, measure, weights=(0.0, 0.2, 0.4, 0.7), feedback=(3, 10)
        )
        return Settings(
            _WEIGHTS[int(np.argmax(values))], choice.reranker.weight, choice.reranker.feedback
        )

    def family(self, encoder: Encoder, vectors: Any, settings: Settings) -> dict[str, Stage]:
        """Return an encoder's systems by kind: alone, with feedback, fused with BM25."""
        stage, dense = self.dense(encoder, vectors)
        reranker = PseudoQueryReranker.from_dense(
            dense,
            weight=settings.feedback_weight,
            feedback=settings.feedback_documents,
            depth=DEPTH,
        )
        return {
            "dense": stage,
            "feedback": stage >> reranker,
            "rrf": rrf(self.bm25, stage),
            "weighted": weighted(self.bm25, stage, weights=settings.weights),
        }


def _metric(dev: Dataset) -> Callable[[Run], float]:
    def measure(run: Run) -> float:
        return float(evaluate(run, dev.qrels, ["nDCG@10"]).mean["nDCG@10"])

    return measure


def latencies(stage: Stage, queries: Mapping[str, str]) -> tuple[float, float]:
    """Median and 99th percentile of the time one query takes by itself, in milliseconds."""
    taken = []
    for query, text in queries.items():
        began = time.perf_counter()
        stage({query: text})
        taken.append((time.perf_counter() - began) * 1e3)
    # The first ones pay for what is loaded once.
    warm = taken[min(5, len(taken) - 1) :]
    return float(np.percentile(warm, 50)), float(np.percentile(warm, 99))


def encoding_rates(encoders: Mapping[str, Any], texts: Sequence[str]) -> dict[str, float]:
    """Documents a second by each encoder: the fastest of three turns, all see the same machine."""
    from fullrank.bench.timing import Step, Stopwatch, interleaved_times

    sample = texts[:: max(1, len(texts) // 32)]

    def step(encoder: Any) -> Step:
        def encode(clock: Stopwatch) -> tuple[float]:
            began = clock()
            encoder.encode(sample)
            return (clock() - began,)

        return encode

    turns = {name: step(encoder) for name, encoder in encoders.items()}
    found = interleaved_times(turns, time.perf_counter, cycle=1, cycles=3, warmup=1, turn=1)
    return {name: 1e3 * len(sample) / milliseconds for name, (milliseconds,) in found.items()}
