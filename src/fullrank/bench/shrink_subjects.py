"""What is shrunk: trained models, each with its data, its metric and its fine-tuning loss."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from fullrank.bench.shrink_images import read_cifar10, residual_net
from fullrank.bench.shrink_sizes import ShrinkSize
from fullrank.compress.batches import Batches, attention_mask, output_of
from fullrank.compress.targets import factorisable
from fullrank.core.batches import Batch, call
from fullrank.core.errors import InputError
from fullrank.core.files import atomic_write
from fullrank.core.modes import evaluating

Values = npt.NDArray[np.float64]
# Documents whose embeddings are compared; they are in nothing else.
_COMPARED = 100


class Subject(ABC):
    """A trained model, and all that is needed to shrink it and to tell how good it is.

    Attributes
    ----------
    original
        The model; nothing may change it.
    metric, lower_is_better
        What :meth:`values` is of.
    layers
        Names of the layers that all methods may shrink.
    calibration
        Batches for what looks at data.
    example
        A batch to time and count a forward pass on.
    grid
        Ranks that a method is free to choose are multiples of it.
    lr
        Peak learning rate of fine-tuning.
    clusters
        A label for each value, where values hang together.
    """

    metric: str
    lower_is_better = False
    grid = 8
    lr = 1e-3
    clusters: Sequence[Hashable] | None = None
    original: nn.Module
    layers: tuple[str, ...]
    calibration: list[Batch]
    example: Batch

    @abstractmethod
    def values(self, model: nn.Module) -> Values:
        """Return the metric of each query, image or sequence."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return what fine-tuning minimises."""

    @abstractmethod
    def training(self, seed: int) -> Iterator[Any]:
        """Yield batches for :meth:`loss`, without end."""

    def inputs(self, batch: Any) -> Batch:
        """Return a training batch without its target."""
        found: Batch = batch
        return found

    def ready(self, model: nn.Module) -> nn.Module:
        """Put a model into the mode that it is fine-tuned in: without dropout."""
        return model.eval()

    def cosine(self, model: nn.Module) -> float | None:
        """Return the mean cosine of its embeddings with the original's; None without any."""
        return None


def _shuffled(batches: Sequence[Any], seed: int) -> Iterator[Any]:
    draw = random.Random(seed)
    while True:
        yield from draw.sample(batches, len(batches))


# -- a sentence encoder ------------------------------------------------------------------------


class EncoderSubject(Subject):
    """The embedded encoder, ranking documents of a collection for its queries."""

    metric = "nDCG@10"
    lr = 1e-4

    def __init__(self, collection: str, size: ShrinkSize) -> None:
        from fullrank import datasets
        from fullrank.core.models import DEFAULT_ENCODER, load_sentence_transformer
        from fullrank.retrieval import RankingMetric

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
        self.calibration = self._batches(texts, size)
        self.example = self._batches([" ".join(texts)] * 8, size)[0]
        self._embedded = self._embed(self.original)

    def _batches(self, texts: list[str], size: ShrinkSize) -> list[Batch]:
        made = Batches(self.original, texts, batch_size=size.batch, max_length=size.tokens)
        return list(made)

    def values(self, model: nn.Module) -> Values:
        return self._metric(model)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Squared error of the embeddings: no labels are needed."""
        mask = attention_mask(batch)
        with torch.no_grad():
            wanted = output_of(call(self.original, batch), mask).value
        found = output_of(call(model, batch), mask).value
        return (found - wanted).square().sum(-1).mean()

    def training(self, seed: int) -> Iterator[Any]:
        return _shuffled(self.calibration, seed)

    def _embed(self, model: Any) -> Tensor:
        found: Tensor = model.encode(self._compared, convert_to_tensor=True)
        return nn.functional.normalize(found, dim=1)

    def cosine(self, model: nn.Module) -> float:
        return float((self._embed(model) * self._embedded).sum(1).mean())


def _divided(data: Any, part: Any, size: ShrinkSize) -> tuple[Any, list[str], list[str]]:
    """Documents to rank, texts to compare embeddings of, texts to calibrate on: none in common."""
    draw = random.Random(0)
    judged = {d for judgements in part.qrels.values() for d in judgements}
    kept = [i for i in data.corpus.ids if i in judged]
    others = [i for i in data.corpus.ids if i not in judged]
    draw.shuffle(others)
    room = len(others) - size.texts - _COMPARED
    if room < 0:
        raise InputError(
            f"{data.name} has {len(others)} documents that no test query judges; "
            f"{size.texts + _COMPARED} are needed to calibrate and compare on"
        )
    measured = max(0, min(size.documents - len(kept), room))
    contents = [data.corpus[i].contents for i in others[measured:]]
    queries = list(data.split("train").queries.values()) if data.parts else []
    draw.shuffle(queries)
    texts = queries[: size.texts // 2]
    texts += contents[_COMPARED : _COMPARED + size.texts - len(texts)]
    return data.corpus.subset(kept + others[:measured]), contents[:_COMPARED], texts


# -- a language model --------------------------------------------------------------------------


class LMSubject(Subject):
    """A causal language model over bytes, trained as `fullrank train lm` does."""

    metric = "bits per byte"
    lower_is_better = True

    def __init__(self, source: str, size: ShrinkSize, folder: Path) -> None:
        from fullrank.bench.lm_jobs import sampled
        from fullrank.bench.sizes import Size
        from fullrank.datasets.texts import read_texts
        from fullrank.training.lm import train_lm
        from fullrank.training.lm_config import LMTraining
        from fullrank.training.lm_data import BYTES, LMData, read_tokenizer

        shape = Size(
            *("shrink", size.width, size.layers, size.heads, size.context, size.batch),
            steps=size.pretraining,
            evaluations=2,
            dev_bytes=size.dev_bytes,
        )
        data = {"tokenizer": BYTES, "context": size.context + 1, "dev_bytes": 2 * size.dev_bytes}
        run = LMTraining.of(
            {
                "model": {"config": shape.model()},
                "data": data,
                "optimizer": {"name": "adamw", "lr": 1e-3},
                "loop": {
                    "steps": size.pretraining,
                    "batch_size": size.batch,
                    "evaluations": shape.evaluations,
                    "device": "cpu",
                },
            }
        )
        texts = sampled(read_texts(source), size.dev_bytes)
        trained = train_lm(run, texts=texts, out=folder / f"lm-{texts.name}", progress=False)
        self.original = trained.model
        self.layers = tuple(factorisable(self.original))
        found = LMData.of(texts, read_tokenizer(BYTES), size.context + 1, 2 * size.dev_bytes)
        self._train, self._batch = found.train, size.batch
        whole = [
            block["input_ids"] for block in found.dev if len(block["input_ids"]) > size.context
        ]
        self._dev = torch.stack(whole).split(size.batch)
        self._bits = float(np.log(2)) * found.bytes_per_token
        draw = self.training(seed=-1)
        self.calibration = [
            {"input_ids": next(draw)} for _ in range(max(2, size.texts // size.batch))
        ]
        self.example = {"input_ids": self._dev[0][:8]}

    @torch.no_grad()
    def values(self, model: nn.Module) -> Values:
        with evaluating(model):
            found = [self._nats(model, ids).mean(1) for ids in self._dev]
        bits: Values = torch.cat(found).double().numpy() / self._bits
        return bits

    def _nats(self, model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(input_ids=ids[:, :-1]).logits
        nats = nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
        return nats

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the next byte."""
        return self._nats(model, batch).mean()

    def inputs(self, batch: Any) -> Batch:
        return {"input_ids": batch}

    def training(self, seed: int) -> Iterator[Tensor]:
        draw = random.Random(seed)
        while True:
            chosen = draw.sample(range(len(self._train)), self._batch)
            yield torch.stack([self._train[i]["input_ids"] for i in chosen])


# -- an image classifier -----------------------------------------------------------------------


class ImageSubject(Subject):
    """A residual network on a part of CIFAR-10."""

    metric = "accuracy"
    grid = 1

    def __init__(self, size: ShrinkSize, folder: Path) -> None:
        from fullrank.bench.shrink_training import train

        self._data = read_cifar10(size.images, size.test_images)
        self._batch = size.batch
        torch.manual_seed(0)
        self.original = residual_net(size.channels)
        path = folder / "cifar10.safetensors"
        if path.is_file():
            self.original.load_state_dict(load_file(path))
        else:
            steps = size.epochs * len(self._data.y) // size.batch
            train(self, self.original, steps, seed=0, lr=3e-3)
            atomic_write(path, safetensors_bytes(self.original.state_dict()))
        self.original.eval()
        names = list(factorisable(self.original))
        # The first convolution and the classifier are small, and all depends on them.
        self.layers = tuple(names[1:-1])
        self.calibration = list(self._data.x[: size.texts].split(size.batch))
        self.example = self._data.x_test[:32]

    @torch.no_grad()
    def values(self, model: nn.Module) -> Values:
        with evaluating(model):
            found = torch.cat([model(x).argmax(1) for x in self._data.x_test.split(250)])
        right: Values = (found == self._data.y_test).double().numpy()
        return right

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Cross-entropy of the class."""
        x, y = batch
        return nn.functional.cross_entropy(model(x), y)

    def inputs(self, batch: Any) -> Batch:
        found: Tensor = batch[0]
        return found

    def training(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(len(self._data.y), generator=generator)
            # Batch statistics of a last, smaller batch would be worse ones.
            for index in order.split(self._batch)[: len(order) // self._batch]:
                yield self._data.x[index], self._data.y[index]

    def ready(self, model: nn.Module) -> nn.Module:
        """Batch statistics follow the weights."""
        return model.train()


SUBJECTS: dict[str, Callable[[ShrinkSize, Path], Subject]] = {
    "cifar10": ImageSubject,
    "lm": lambda size, folder: LMSubject("tinyshakespeare", size, folder),
    "vaswani": lambda size, _: EncoderSubject("vaswani", size),
    "cranfield": lambda size, _: EncoderSubject("cranfield", size),
    "pydocs": lambda size, _: EncoderSubject("pydocs", size),
}
"""Name -> how a subject is made: a size, and a folder where trained models are kept."""


def chosen_subjects(names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of subjects, all by default.

    Raises
    ------
    InputError
        For a name that no subject has.
    """
    for name in names or ():
        if name not in SUBJECTS:
            raise InputError(f"no model {name!r} to shrink; there are {', '.join(SUBJECTS)}")
    return tuple(name for name in SUBJECTS if not names or name in names)
