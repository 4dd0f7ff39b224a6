"""`run_demo`: collect, index, order, train, see, shrink, evaluate, report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fullrank.core.errors import StoreError
from fullrank.core.files import atomic_write
from fullrank.core.table import Table
from fullrank.demo import steps
from fullrank.demo.cache import Cache
from fullrank.demo.config import METRICS, DemoConfig
from fullrank.demo.encoding import Encoded, Encoding
from fullrank.demo.memory import give_back_memory, peak_bytes
from fullrank.demo.outcome import Outcome, Sizes
from fullrank.demo.pages import write_report
from fullrank.demo.systems import Pipelines, Settings, encoding_rates, latencies

RESULTS = "results.json"
_STEPS = 8
_SUCCESSORS = ("dense", "feedback", "weighted")


@dataclass
class Clock:
    """Says which step runs, and how long each took."""

    say: Callable[[str], None]
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def step(self, title: str, expected: str = "") -> Iterator[None]:
        """Time one step; ``expected`` says beforehand how long it may take."""
        hint = f" (about {expected})" if expected else ""
        self.say(f"[{len(self.seconds) + 1}/{_STEPS}] {title}{hint}")
        began = time.monotonic()
        yield
        self.seconds[title] = time.monotonic() - began
        give_back_memory()

    def note(self, text: str) -> None:
        """Say what a step found."""
        self.say(f"      {text}")


def run_demo(
    config: DemoConfig | None = None,
    *,
    progress: bool = True,
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True),
) -> Outcome:
    """Do the main job and write its folder.

    Parameters
    ----------
    config
        See :class:`DemoConfig`.
    progress
        Show bars.
    say
        Called with a line of text for each step and finding.

    Returns
    -------
    Outcome
        Everything that was measured. The folder holds ``report.html``, ``xray.html``,
        ``results.json``, ``index/``, ``models/tuned/``, ``models/shrunk/`` and ``plan.json``.

    Raises
    ------
    StoreError
        When the folder holds something that is no demo.
    """
    config = config or DemoConfig()
    target = config.out
    if target.exists() and not (target / RESULTS).is_file() and any(target.iterdir()):
        raise StoreError(f"{target} is in use and holds no demo; give another folder")
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        outcome = _run(config, part, Clock(say), progress)
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return outcome


def _run(config: DemoConfig, out: Path, clock: Clock, progress: bool) -> Outcome:
    cache = Cache(config.cache_folder)
    with clock.step("collect the documentation of this machine", "10 s"):
        data = steps.collect(config)
        dev, test = data.split("dev"), data.split("test")
        clock.note(repr(data))
    encoding = Encoding(cache, data.corpus, config.tokens, progress)
    with clock.step("index it: BM25, and vectors of the encoder", "30 s"):
        pipelines = Pipelines(data)
        base = encoding(config.encoder)
    with clock.step("order: choose the weights of fusion and feedback on the dev queries"):
        settings = pipelines.tune(base.encoder, base.vectors, dev)
        clock.note(
            f"fusion gives the dense ranking {settings.dense_weight:g}, feedback of "
            f"{settings.feedback_documents} documents gets {settings.feedback_weight:g}"
        )
    box = f"{config.seconds:.0f} s at most" if config.seconds else ""
    with clock.step("train: fine-tune the encoder with GaLore", box):
        trained = steps.train(config, data, cache, progress)
        tuned = encoding(trained.model)
        history = trained.history
        clock.note(
            f"{len(history.steps)} steps; dev {history.metric} {history.gain:+.4f}; state "
            f"{trained.memory.peak_bytes / 1e6:.1f} MB, AdamW's would be "
            f"{trained.memory.adamw_bytes / 1e6:.1f} MB"
        )
    with clock.step("see: X-ray the encoder before and after"):
        from fullrank.spectra import xray

        before = xray(base.encoder.model, name="untuned", show_progress=progress)
        after = xray(tuned.encoder.model, name="tuned", show_progress=progress)
        after.to_html(out / "xray.html")
    with clock.step("shrink: find the smallest model that keeps the floor", "4 min"):
        shrinking = steps.shrink(config, data, tuned, encoding, cache, progress)
        found = shrinking.found
        chosen = steps.chosen_candidate(found)
        clock.note(
            f"{'' if chosen.holds else 'no plan measured holds the floor; the closest '}"
            f"keeps {chosen.kept:.1%} of the linear parameters and {chosen.ratio:.2%} of dev "
            f"nDCG@10 (99 % lower end {chosen.lower:.2%})"
        )
        floor, decidable = steps.confirm_floor(
            config, data, tuned.encoder.model, found.model, encoding
        )
        clock.note(f"on the test queries it {floor}")
    with clock.step("evaluate every system on the test queries"):
        shrunk = encoding(found.model)
        _save_models(out, trained.model, found)
        encoders = {"base": base, "tuned": tuned, "shrunk": shrunk}
        index = _index(config, out, data, encoders, settings)
        runs = {
            name: stage(test.queries)
            for name, stage in _systems(pipelines, encoders, settings).items()
        }
        comparison = _compare(runs, test, config)
        sizes = _sizes(out, config, index, data)
        speed = _latency_table(index, test.queries)
    with clock.step("report"):
        outcome = Outcome(
            config=config,
            data=data,
            settings=settings,
            trained=trained,
            before=before,
            after=after,
            shrinking=shrinking,
            floor=floor,
            decidable=decidable,
            runs=runs,
            comparison=comparison,
            sizes=sizes,
            latency=speed,
            seconds=dict(clock.seconds),
            peak_bytes=peak_bytes(),
            from_cache=cache.hits,
        )
        write_report(outcome, out / "report.html")
        atomic_write(out / RESULTS, json.dumps(outcome.to_json(), indent=1).encode())
    return outcome


def _systems(
    pipelines: Pipelines, encoders: dict[str, Encoded], settings: Settings
) -> dict[str, Any]:
    """What is compared: the untuned encoder in every way, its successors where it matters."""
    families = {
        name: pipelines.family(encoded.encoder, encoded.vectors, settings)
        for name, encoded in encoders.items()
    }
    shown = {"base": tuple(families["base"]), **dict.fromkeys(("tuned", "shrunk"), _SUCCESSORS)}
    return {"BM25": pipelines.bm25} | {
        f"{kind} ({name})": families[name][kind] for name, kinds in shown.items() for kind in kinds
    }


def _compare(runs: Any, test: Any, config: DemoConfig) -> Any:
    from fullrank.evaluate import compare

    # Enough that Holm's correction over all the table's tests can still find something.
    return compare(
        runs,
        test.qrels,
        METRICS,
        baseline="BM25",
        clusters=test.clusters,
        permutations=50_000,
        seed=config.seed,
    )


def _save_models(out: Path, tuned: Any, found: Any) -> None:
    from fullrank.compress import save

    save(tuned, out / "models" / "tuned")
    save(found.model, out / "models" / "shrunk")
    found.plan.save(out / "plan.json")


def _index(
    config: DemoConfig,
    out: Path,
    data: Any,
    encoders: dict[str, Encoded],
    settings: Settings,
) -> Any:
    """Write the index that `serve` and `order search` open, from vectors that are there."""
    from fullrank.retrieval import Encoder, Index

    sources = {
        "base": config.encoder,
        "tuned": out / "models" / "tuned",
        "shrunk": out / "models" / "shrunk",
    }
    return Index.create(
        out / "index",
        data.corpus,
        {name: Encoder(source, max_tokens=config.tokens) for name, source in sources.items()},
        vectors={name: encoded.vectors for name, encoded in encoders.items()},
        settings={
            "weights": settings.weights,
            "feedback_first": "dense",
            "feedback_weight": settings.feedback_weight,
            "feedback_documents": settings.feedback_documents,
            "default_system": "weighted:tuned",
        },
        progress=False,
    )


def _latency_table(index: Any, queries: Any) -> Table:
    sample = dict(list(queries.items())[:30])
    rows = []
    for name, stage in index.systems.items():
        median, tail = latencies(stage, sample)
        rows.append([name, median, tail])
    return Table(
        ["system", "p50 ms", "p99 ms"],
        rows,
        title=f"Time of one query by itself, encoding included ({len(sample)} queries)",
        formats={"p50 ms": ".1f", "p99 ms": ".1f"},
    )


def _sizes(out: Path, config: DemoConfig, index: Any, data: Any) -> list[Sizes]:
    from fullrank.core.models import resolve_model

    folders: dict[str, Path] = {
        "base": Path(resolve_model(config.encoder)),
        "tuned": out / "models" / "tuned",
        "shrunk": out / "models" / "shrunk",
    }
    encoders = {n: index.encoders[n].loaded for n, folder in folders.items() if folder.is_dir()}
    rates = encoding_rates(encoders, data.corpus.contents)
    return [
        Sizes.of(name, encoder, steps.folder_bytes(folders[name]), rates[name])
        for name, encoder in encoders.items()
    ]
