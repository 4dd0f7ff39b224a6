"""What adapters are compared on: how each task is set up, and what is measured afterwards."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from fullrank.bench.adapter_digits import TurnedDigits, accuracy, digits
from fullrank.bench.adapter_sizes import AdapterSize
from fullrank.bench.lm_jobs import sampled
from fullrank.core.models import DEFAULT_ENCODER
from fullrank.core.modes import evaluating
from fullrank.datasets.texts import Texts, read_texts
from fullrank.training.config import EncoderTraining
from fullrank.training.dev import DevSet
from fullrank.training.finetune_config import FinetuneRun
from fullrank.training.finetune_tasks import Task, make_task
from fullrank.training.lm import train_lm
from fullrank.training.lm_config import LMTraining
from fullrank.training.lm_data import BYTES, LMData, bits_per_byte, read_tokenizer
from fullrank.training.processes import Processes
from fullrank.training.results import RESULT


@dataclasses.dataclass(frozen=True)
class Measure:
    """Something that is measured after a run.

    Attributes
    ----------
    name, spec
        Its column, and the format of its values.
    lower_is_better
        Whether it is.
    """

    name: str
    spec: str = ".4f"
    lower_is_better: bool = False


class Scene(ABC):
    """One task of the comparison.

    Parameters
    ----------
    size
        Its budget.
    home
        Where what is trained beforehand is kept.

    Attributes
    ----------
    measures
        What is measured after a run; the first is the aim, others may be what is forgotten.
    model, data
        Sections of a run's settings.
    precision
        What forward and backward compute in.
    """

    measures: ClassVar[tuple[Measure, ...]]
    precision: ClassVar[str] = "float32"

    def __init__(self, size: AdapterSize, home: Path) -> None:
        self.size, self.home = size, home
        self.model: dict[str, Any] = {"name": size.task}
        self.data: dict[str, Any] = {"source": size.task}

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Says what the data are."""

    @abstractmethod
    def task(self, run: FinetuneRun, processes: Processes) -> Task:
        """Make what is fine-tuned."""

    @abstractmethod
    def measured(self, model: Any) -> list[float]:
        """Return a value for each of :attr:`measures`."""

    @property
    def ready(self) -> bool:
        """Whether the base is there."""
        return True

    def prepare(self, device: str) -> dict[str, Any]:
        """Make the base, where it is to be trained first; return what is to be known of it."""
        return {}

    def run(
        self, adapter: Mapping[str, Any], optimizer: Mapping[str, Any], seed: int, device: str
    ) -> FinetuneRun:
        """Return the settings of a run."""
        size = self.size
        loop = {
            "steps": size.steps,
            "batch_size": size.batch,
            "evaluations": size.evaluations,
            "precision": self.precision,
            "device": device,
            "seed": seed,
        }
        return FinetuneRun.of(
            {
                "model": self.model,
                "data": self.data,
                "adapter": dict(adapter),
                "optimizer": dict(optimizer),
                "loop": loop,
            }
        )


class Digits(Scene):
    """Upright digits to turned ones."""

    measures = (Measure("turned, accuracy"), Measure("upright, accuracy"))
    fingerprint = "scikit-learn's digits"

    def task(self, run: FinetuneRun, processes: Processes) -> Task:
        """Turned digits for the MLP."""
        return TurnedDigits(run, processes)

    def measured(self, model: Any) -> list[float]:
        """Accuracy on the test images, turned and upright."""
        return [accuracy(model, digits(turned)[2]) for turned in (True, False)]


class Retrieval(Scene):
    """The embedded encoder to search Python's documentation; two other collections forgotten."""

    measures = tuple(Measure(f"{name}, nDCG@10") for name in ("pydocs", "vaswani", "cranfield"))
    precision = "auto"

    def __init__(self, size: AdapterSize, home: Path) -> None:
        super().__init__(size, home)
        self.model = {"kind": "encoder", "name": DEFAULT_ENCODER}
        self.data = {
            "source": "pydocs",
            "max_tokens": size.tokens,
            "hard_negatives": 0,
            "dev_queries": max(1, size.sample // _DOCUMENTS_A_QUERY["pydocs"]),
            "dev_documents": size.sample,
        }

    @property
    def fingerprint(self) -> str:
        """Of the three collections."""
        return json.dumps(
            {name: _collection(name).corpus.fingerprint for name in _DOCUMENTS_A_QUERY}
        )

    def task(self, run: FinetuneRun, processes: Processes) -> Task:
        """The judged queries of pydocs."""
        return make_task(run, _collection("pydocs"), processes)

    @functools.cached_property
    def _samples(self) -> list[DevSet]:
        found = []
        for name, documents in _DOCUMENTS_A_QUERY.items():
            data = _collection(name)
            settings = EncoderTraining(
                seed=0,
                dev_queries=max(1, self.size.sample // documents),
                dev_documents=self.size.sample,
                dev_tokens=self.size.tokens,
            )
            part = data.split("test") if "test" in data.parts else data
            found.append(DevSet(part, data.corpus, settings, self.size.tokens))
        return found

    def measured(self, model: Any) -> list[float]:
        """nDCG@10 of the test queries over a sample of each collection."""
        return [sample.measure(model)[0] for sample in self._samples]


class Language(Scene):
    """A language model of Python source to grade-school mathematics; Python forgotten."""

    measures = (
        Measure("gsm8k, bits per byte", lower_is_better=True),
        Measure("gsm8k, next byte right"),
        Measure("python, bits per byte", lower_is_better=True),
    )

    def __init__(self, size: AdapterSize, home: Path) -> None:
        super().__init__(size, home)
        trained = json.dumps([dict(size.base), size.tokens, size.sample], sort_keys=True)
        self.folder = home / f"language-{hashlib.sha256(trained.encode()).hexdigest()[:8]}"
        self.model = {"kind": "lm", "name": str(self.folder)}
        self.data = {
            "source": "gsm8k",
            "max_tokens": size.tokens,
            "dev_bytes": 2 * size.sample,
        }

    @property
    def fingerprint(self) -> str:
        """Of the texts before and after."""
        return json.dumps(
            {name: read_texts(name).fingerprint for name in ("python_source", "gsm8k")}
        )

    @property
    def ready(self) -> bool:
        """Whether the language model has been trained."""
        return (self.folder / RESULT).is_file()

    def prepare(self, device: str) -> dict[str, Any]:
        """Train the language model on Python source."""
        base = dict(self.size.base)
        loop = {name: base.pop(name) for name in ("steps", "batch_size")}
        run = LMTraining.of(
            {
                "model": {
                    "config": {
                        "model_type": "llama",
                        "max_position_embeddings": self.size.tokens,
                        **base,
                    }
                },
                "data": {
                    "tokenizer": BYTES,
                    "context": self.size.tokens,
                    "dev_bytes": 2 * self.size.sample,
                },
                "optimizer": {"lr": 3e-3},
                "loop": {**loop, "evaluations": 1, "precision": "float32", "device": device},
            }
        )
        texts = _texts("python_source", "dev", self.size.sample)
        trained = train_lm(run, texts=texts, out=self.folder, progress=False)
        return {"parameters": trained.data["parameters"]}

    def task(self, run: FinetuneRun, processes: Processes) -> Task:
        """Questions and answers as running text."""
        return make_task(run, _texts("gsm8k", "dev", self.size.sample), processes)

    @functools.cached_property
    def _parts(self) -> list[LMData]:
        size = self.size
        return [
            LMData.of(
                _texts(name, "test", size.sample),
                read_tokenizer(BYTES),
                size.tokens,
                2 * size.sample,
            )
            for name in ("gsm8k", "python_source")
        ]

    def measured(self, model: Any) -> list[float]:
        """Bits per byte of both test parts, and how often the likeliest byte is the next one."""
        batch = 4 * self.size.batch
        mathematics, python = (bits_per_byte(model, part, batch, None) for part in self._parts)
        return [mathematics, _hits(model, self._parts[0], batch), python]


SCENES: Mapping[str, type[Scene]] = {
    "digits": Digits,
    "retrieval": Retrieval,
    "language": Language,
}

# Documents of a sample for each of its queries: more than are judged for one.
_DOCUMENTS_A_QUERY = {"pydocs": 4, "vaswani": 30, "cranfield": 12}


@functools.cache
def _collection(name: str) -> Any:
    from fullrank.datasets import read_dataset

    return read_dataset(name)


@functools.cache
def _texts(name: str, part: str, size: int) -> Texts:
    """Texts whose dev part is a sample of this part."""
    texts = read_texts(name)
    return sampled(
        dataclasses.replace(texts, parts={**texts.parts, "dev": texts.parts[part]}), size
    )


@torch.no_grad()
def _hits(model: Any, data: LMData, size: int) -> float:
    """Share of the tokens of the dev part that the model takes for the likeliest."""
    device = next(model.parameters()).device
    blocks = [b["input_ids"] for b in data.dev if len(b["input_ids"]) == data.dev.length]
    hits = []
    with evaluating(model):
        for start in range(0, len(blocks), size):
            ids = torch.stack(blocks[start : start + size]).to(device)
            found = model(input_ids=ids).logits[:, :-1].argmax(-1)
            hits.append((found == ids[:, 1:]).double().flatten())
    return float(torch.cat(hits).mean())
