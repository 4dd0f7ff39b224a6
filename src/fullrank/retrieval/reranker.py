"""`RerankerStage`: what rerankers have in common."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Corpus, Queries
from fullrank.core.errors import InputError
from fullrank.core.run import Ids, Ranking, Run, Scores
from fullrank.retrieval.stages import Stage


class RerankerStage(Stage):
    """A stage that puts what another one found into a new order.

    Attributes
    ----------
    depth
        How many items of a query it looks at; what is behind them stays behind them.
    """

    depth: int

    @abstractmethod
    def rerank(self, queries: Queries, run: Run, corpus: Corpus | None = None) -> Run:
        """Return the same items for every query in a new order."""

    def transform(self, queries: Queries, run: Run | None, corpus: Corpus | None) -> Run:
        """Rerank what the stage before found."""
        if run is None:
            raise InputError(
                f"{self.name} has nothing to rerank: put it behind a retriever, as in "
                "bm25 >> reranker"
            )
        return self.rerank(queries, run, corpus)


def with_tail(ranking: Ranking, scores: npt.NDArray[np.floating[Any]]) -> tuple[Ids, Scores]:
    """Ids and scores of a ranking whose first ``len(scores)`` items were scored anew.

    The others keep their order behind them, each one lower than the one before.

    >>> ranking = Ranking(np.array(["a", "b", "c"], dtype=object), np.array([3.0, 2.0, 1.0]))
    >>> with_tail(ranking, np.array([0.5, 0.75]))[1].tolist()
    [0.5, 0.75, -0.5]
    """
    head = np.asarray(scores, dtype=np.float64)
    lowest = head.min() if len(head) else 0.0
    tail = lowest - np.arange(1, len(ranking) - len(head) + 1)
    return ranking.ids, np.concatenate([head, tail])
