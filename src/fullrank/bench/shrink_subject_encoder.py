"""The embedded encoder, to be shrunk."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.bench.shrink_sizes import ShrinkSize
from fullrank.bench.shrink_subject import Subject, Values
from fullrank.compress.batches import Batches, attention_mask, output_of
from fullrank.compress.targets import factorisable
from fullrank.core.batches import Batch, call
from fullrank.core.errors import InputError

# Documents whose embeddings are compared; they are in nothing else.
_COMPARED = 100
# Texts that a forward pass is timed on, and their tokens: those of a document.
_EXAMPLES, _EXAMPLE_TOKENS = 8, 128


class EncoderSubject(Subject):
    """The embedded encoder, ranking documents of a collection for its queries."""

    metric = "nDCG@10"

    def __init__(self, collection: str, size: ShrinkSize) -> None:
        from fullrank import datasets
        from fullrank.core.models import DEFAULT_ENCODER, load_sentence_transformer
        from fullrank.retrieval import RankingMetric

        self.lr = size.encoder_lr
        data = getattr(datasets, collection)()
        part = data.split("test") if data.parts else data
        corpus, self._compared, texts = _divided(data, part, size)
        self.original = load_sentence_transformer(DEFAULT_ENCODER, device="cpu").eval()
        self._metric = RankingMetric(
            *(self.metric, corpus, part.queries, part.qrels),
            exclude=part.exclude,
            max_tokens=size.tokens,
        )
        if part.clusters:
            self.clusters = [part.clusters[q] for q in self._metric.queries]
        # The pooler's output is not part of an embedding that is a mean.
        self.layers = tuple(factorisable(self.original, exclude="*pooler*"))
        self.calibration = list(
            Batches(self.original, texts, batch_size=size.batch, max_length=size.tokens)
        )
        whole = [" ".join(texts)] * _EXAMPLES
        self.example = next(iter(Batches(self.original, whole, max_length=_EXAMPLE_TOKENS)))
        self._embedded = self._embed(self.original)

    def values(self, model: nn.Module) -> Values:
        """See :meth:`Subject.values`."""
        return self._metric(model)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Squared error of the embeddings: no labels are needed."""
        texts, wanted = batch
        found = output_of(call(model, texts), attention_mask(texts)).value
        error: Tensor = (found - wanted).square().sum(-1).mean()
        return error

    def inputs(self, batch: Any) -> Batch:
        """See :meth:`Subject.inputs`."""
        found: Batch = batch[0]
        return found

    def training(self, seed: int) -> Iterator[tuple[Batch, Tensor]]:
        """See :meth:`Subject.training`."""
        draw = random.Random(seed)
        while True:
            yield from draw.sample(self._taught, len(self._taught))

    @functools.cached_property
    def _taught(self) -> list[tuple[Batch, Tensor]]:
        """The texts of calibration, each batch with the original's embeddings of it."""
        with torch.no_grad():
            return [
                (texts, output_of(call(self.original, texts), attention_mask(texts)).value)
                for texts in self.calibration
            ]

    def _embed(self, model: Any) -> Tensor:
        found: Tensor = model.encode(self._compared, convert_to_tensor=True)
        return nn.functional.normalize(found, dim=1)

    def cosine(self, model: nn.Module) -> float:
        """See :meth:`Subject.cosine`."""
        return float((self._embed(model) * self._embedded).sum(1).mean())


def _divided(data: Any, part: Any, size: ShrinkSize) -> tuple[Any, list[str], list[str]]:
    """Documents to rank, texts to compare embeddings of, texts to calibrate on: none in common."""
    draw = random.Random(0)
    judged = {d for judgements in part.qrels.values() for d in judgements}
    kept = [i for i in data.corpus.ids if i in judged]
    others = [i for i in data.corpus.ids if i not in judged]
    draw.shuffle(others)
    # Small collections leave fewer texts to calibrate on, and nothing beside the judged to rank.
    if len(others) < 2 * _COMPARED:
        raise InputError(
            f"{data.name} has {len(others)} documents that no test query judges; at least "
            f"{2 * _COMPARED} are needed to calibrate and compare on"
        )
    room = len(others) - size.texts - _COMPARED
    measured = max(0, min(size.documents - len(kept), room))
    contents = [data.corpus[i].contents for i in others[measured:]]
    queries = list(data.split("train").queries.values()) if data.parts else []
    draw.shuffle(queries)
    texts = queries[: size.texts // 2]
    texts += contents[_COMPARED : _COMPARED + size.texts - len(texts)]
    return data.corpus.subset(kept + others[:measured]), contents[:_COMPARED], texts
