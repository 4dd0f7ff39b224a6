"""The demo's steps, one function each, in the order in which they run."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fullrank.compress import (
    Batches,
    CalibrationStats,
    Candidate,
    Distillation,
    FloorError,
    PlanFamily,
    Shrunk,
)
from fullrank.compress import shrink as search_smallest
from fullrank.compress.targets import factorisable
from fullrank.core.errors import StoreError
from fullrank.datasets import Dataset, pydocs
from fullrank.demo.cache import Cache
from fullrank.demo.config import DemoConfig
from fullrank.demo.encoding import Encoded, Encoding
from fullrank.demo.recovery import CachedRecovery
from fullrank.evaluate import FloorTest, floor_test, smallest_floor
from fullrank.retrieval import RankingMetric
from fullrank.training import EncoderTraining, TrainedEncoder, train_encoder
from fullrank.training.quiet import precision_of

# Shares of the linear parameters between which the smallest is looked for.
_START, _LOWEST = 0.8, 0.5
# Targets of distillation have no noise: many small steps reach lower than few large ones.
_RECOVERY_BATCH = 16
# Gradients of all layers' outputs are held at once: small batches keep the peak low.
_CALIBRATION_BATCH = 8
# The smallest of several plans that hold is smaller than it should be by luck. Chosen at this
# confidence, it is likely to be confirmed at 95 % by queries that had no part in the choice.
CHOICE_CONFIDENCE = 0.99


def collect(config: DemoConfig) -> Dataset:
    """Read the documentation of the packages on this machine."""
    return pydocs(size=config.size, every=config.every, quick=config.quick, seed=config.seed)


def train(config: DemoConfig, data: Dataset, cache: Cache, progress: bool) -> TrainedEncoder:
    """Fine-tune the encoder on the train part; a run that was interrupted goes on."""
    small: dict[str, Any] = {"max_tokens": 32, "batch_size": 8, "evaluations": 2}
    settings = EncoderTraining(
        seconds=config.seconds,
        max_steps=config.max_steps,
        seed=config.seed,
        **(small if config.quick else {}),
    )
    key = cache.key(
        "tuned", config.encoder, data.manifest["sha256"], dict(data.parts), settings.as_dict()
    )
    assert cache.folder is not None
    return train_encoder(
        config.encoder, data, settings, out=cache.folder / f"tuned-{key}", progress=progress
    )


def sample_texts(config: DemoConfig, data: Dataset, count: int) -> list[str]:
    """Draw texts like those the model will see: half train queries where there are as many."""
    draw = random.Random(config.seed)
    queries = sorted(data.split("train").queries.values())
    half = min(count // 2, len(queries))
    documents = draw.sample(data.corpus.contents, min(count - half, len(data.corpus)))
    return draw.sample(queries, half) + documents


@dataclass(frozen=True)
class Shrinking:
    """The search for the smallest model, and the usual way beside it.

    Attributes
    ----------
    found
        The search on the development queries.
    uniform
        Uniform ranks, one shot: share of the parameters -> ratio and its lower end, on the same
        queries.
    decidable
        The floor nearest to 1 that so many queries can decide.
    """

    found: Shrunk
    uniform: tuple[UniformPoint, ...]
    decidable: float


@dataclass(frozen=True)
class UniformPoint:
    """One size of the uniform one-shot curve."""

    kept: float
    ratio: float
    lower: float


def shrink(
    config: DemoConfig,
    data: Dataset,
    tuned: Encoded,
    encoding: Encoding,
    cache: Cache,
    progress: bool,
) -> Shrinking:
    """Find the smallest plan that keeps the floor on dev, and measure the uniform curve."""
    dev = data.split("dev")
    metric = encoding.metric(dev)
    clusters = [dev.clusters[q] for q in metric.queries]
    model = tuned.encoder.model
    stats = _statistics(config, data, tuned, cache, progress)
    texts = sample_texts(config, data, config.recovery)
    recovery = CachedRecovery(
        Distillation(
            model,
            texts,
            max_length=config.tokens,
            batch_size=_RECOVERY_BATCH,
            steps=config.recovery_steps,
            autocast=precision_of("auto", next(model.parameters()).device),
            seed=config.seed,
            progress=progress,
        ),
        cache,
        [tuned.encoder.fingerprint, texts, config.tokens, _RECOVERY_BATCH],
    )
    reference = metric(model)
    try:
        found = search_smallest(
            model,
            metric,
            config.floor,
            calibration=stats,
            clusters=clusters,
            confidence=CHOICE_CONFIDENCE,
            recover=recovery,
            start=_START,
            lowest=_LOWEST,
            max_candidates=config.candidates,
            progress=progress,
            seed=config.seed,
        )
    except FloorError as error:
        # The report then says that none holds it, and shows the one that came closest.
        if error.best is None:
            raise
        small = PlanFamily(model, stats).build(error.best.plan)
        recovery(small)
        test = _choice_test(config, metric(small), reference, clusters)
        found = Shrunk(
            small, error.best.plan, error.curve, test, config.floor, True, float(reference.mean())
        )
    return Shrinking(
        found,
        _uniform_curve(config, model, stats, metric, reference, clusters),
        smallest_floor(metric(found.model), reference, clusters=clusters, seed=config.seed),
    )


def _statistics(
    config: DemoConfig, data: Dataset, tuned: Encoded, cache: Cache, progress: bool
) -> CalibrationStats:
    """Moments of layers' inputs and outputs and of their gradients, or what was kept of them."""
    model, texts = tuned.encoder.model, sample_texts(config, data, config.calibration)
    path = cache.path(
        "statistics",
        tuned.encoder.fingerprint,
        texts,
        [config.tokens, _CALIBRATION_BATCH, config.seed],
    )
    try:
        stats = CalibrationStats.load(path)
        cache.hits += 1
    except StoreError:
        # Texts are as long as those that will be encoded: factors made for the first 64 tokens of
        # documents read to 128 lost three times as much nDCG.
        seen = Batches(model, texts, batch_size=_CALIBRATION_BATCH, max_length=config.tokens)
        stats = CalibrationStats(factorisable(model), gradients=True)
        stats.observe(model, seen, progress=progress, seed=config.seed)
        stats.save(path)
    return stats


def _uniform_curve(
    config: DemoConfig,
    model: Any,
    stats: CalibrationStats,
    metric: RankingMetric,
    reference: npt.NDArray[np.float64],
    clusters: list[str],
) -> tuple[UniformPoint, ...]:
    family = PlanFamily(model, stats, method="output_pca", allocation="uniform")
    points = []
    for share in config.uniform:
        plan = family.plan(share)
        test = _choice_test(config, metric(family.build(plan)), reference, clusters)
        points.append(UniformPoint(plan.savings().kept, test.ratio, test.lower))
    return tuple(points)


def _choice_test(
    config: DemoConfig,
    values: npt.NDArray[np.float64],
    reference: npt.NDArray[np.float64],
    clusters: list[str],
) -> FloorTest:
    return floor_test(
        values,
        reference,
        config.floor,
        clusters=clusters,
        confidence=CHOICE_CONFIDENCE,
        seed=config.seed,
    )


def confirm_floor(
    config: DemoConfig, data: Dataset, tuned: Any, shrunk: Any, encoding: Encoding
) -> tuple[FloorTest, float]:
    """Test the floor once on queries that took no part in the choice.

    Returns
    -------
    test, decidable
        The outcome, and the floor nearest to 1 that so many queries can decide.
    """
    test = data.split("test")
    metric = encoding.metric(test)
    clusters = [test.clusters[q] for q in metric.queries]
    values, base = metric(shrunk), metric(tuned)
    return (
        floor_test(values, base, config.floor, clusters=clusters, seed=config.seed),
        smallest_floor(values, base, clusters=clusters, seed=config.seed),
    )


def chosen_candidate(found: Shrunk) -> Candidate:
    """Return the measured candidate whose plan was chosen."""
    return next(c for c in found.curve if c.plan == found.plan)


def folder_bytes(folder: str | Path) -> int:
    """Bytes of all files of a model."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
