"""The development metric: cheap enough to be measured a few times in a short run."""

from __future__ import annotations

import dataclasses
import random
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError
from fullrank.core.modes import evaluating
from fullrank.evaluate import parse_metric
from fullrank.training.config import EncoderTraining

if TYPE_CHECKING:
    from fullrank.core.corpus import Corpus
    from fullrank.datasets import Dataset
    from fullrank.retrieval.encoder import Encoder

Vectors = npt.NDArray[np.float32]

# Documents whose vectors RankMe is taken of when the metric is the caller's own.
_SAMPLE = 1000
# Share of the queries held out where a data set has no parts.
_HELD_OUT = 0.1


class DevSet:
    """Measures a model on the development queries: a ranking metric, and RankMe.

    At most ``dev_queries`` queries search their judged documents and a random sample that fills
    up to ``dev_documents``, cut to ``dev_tokens`` tokens. The documents are encoded once for both
    numbers. The subset is fixed by the seed, so that values of one run compare.

    Parameters
    ----------
    dataset
        The development part, or None when ``metric`` is given.
    corpus
        All documents.
    config
        See :class:`~fullrank.training.EncoderTraining`.
    limit
        Tokens that the model takes.
    metric
        A function from the model to a number, higher is better, instead of the ranking metric.
        RankMe is then taken of a random sample of 1,000 documents.
    """

    def __init__(
        self,
        dataset: Dataset | None,
        corpus: Corpus,
        config: EncoderTraining,
        limit: int,
        metric: Callable[[Any], float] | None = None,
    ) -> None:
        self.tokens = min(config.dev_tokens, limit)
        self._metric = metric
        self._vectors: Vectors | None = None
        draw = random.Random(config.seed)
        if metric is not None:
            self.name = getattr(metric, "__name__", "metric")
            size = min(_SAMPLE, len(corpus))
            self.documents = corpus.subset(draw.sample(corpus.ids, size))
            self.queries = 0
            return
        assert dataset is not None
        parse_metric(config.metric)
        self.name = config.metric
        self._ranking = self._ranked(dataset, config, draw)
        self.documents = self._ranking.corpus
        self.queries = len(self._ranking.queries)

    def _ranked(self, dataset: Dataset, config: EncoderTraining, draw: random.Random) -> Any:
        from fullrank.retrieval.metric import RankingMetric

        corpus = dataset.corpus
        judged = [q for q in dataset.queries if any(g >= 1 for g in _grades(dataset, q))]
        if not judged:
            raise InputError(
                f"{dataset.name} has no query with a document judged relevant: nothing to "
                "measure training by; give a dev part with judgements, or a dev_metric"
            )
        chosen = sorted(draw.sample(judged, min(config.dev_queries, len(judged))))
        wanted = {d for q in chosen for d in dataset.qrels[q] if d in corpus}
        rest = [d for d in corpus.ids if d not in wanted]
        missing = min(max(config.dev_documents - len(wanted), 0), len(rest))
        wanted |= set(draw.sample(rest, missing))
        return RankingMetric(
            config.metric,
            corpus.subset(wanted),
            {q: dataset.queries[q] for q in chosen},
            {q: dataset.qrels[q] for q in chosen},
            exclude=dataset.exclude,
            max_tokens=self.tokens,
            encode=self._encode,
        )

    def _encode(self, encoder: Encoder, texts: Sequence[str]) -> Vectors:
        self._vectors = encoder.encode(texts)
        return self._vectors

    def measure(self, model: Any) -> tuple[float, float]:
        """Return the metric and RankMe of the documents' vectors. The model is left as it was."""
        from fullrank.spectra import rankme

        with evaluating(model):
            if self._metric is not None:
                from fullrank.retrieval import Encoder

                value = float(self._metric(model))
                self._encode(Encoder(model, max_tokens=self.tokens), self.documents.contents)
            else:
                value = float(self._ranking(model).mean())
        if not np.isfinite(value):
            raise InputError(f"the development metric {self.name} is {value}; it must be finite")
        with warnings.catch_warnings():
            # Few documents bias RankMe, but all values of a run by the same few.
            warnings.simplefilter("ignore", UserWarning)
            return value, float(rankme(self._vectors))


def _grades(dataset: Dataset, query: str) -> Sequence[int]:
    return list(dataset.qrels.get(query, {}).values())


def training_parts(dataset: Dataset, seed: int, needs_dev: bool) -> tuple[Dataset, Dataset | None]:
    """Return what to train on and what to measure on.

    The parts ``"train"`` and ``"dev"`` of a data set that is divided. Of one that is not, a tenth
    of the queries is held out; where queries share documents, the two are then not independent.
    """
    if dataset.parts:
        return dataset.split("train"), dataset.split("dev") if needs_dev else None
    if not needs_dev:
        return dataset, None
    judged = [q for q in dataset.queries if dataset.qrels.get(q)]
    if len(judged) < 3:
        raise InputError(
            f"{dataset.name} has {len(judged)} judged queries; at least three are needed to train "
            "on some and measure on others"
        )
    held = set(random.Random(seed).sample(judged, max(1, round(_HELD_OUT * len(judged)))))
    divided = dataclasses.replace(
        dataset,
        parts={
            "train": tuple(q for q in dataset.queries if q not in held),
            "dev": tuple(q for q in dataset.queries if q in held),
        },
    )
    return divided.split("train"), divided.split("dev")
