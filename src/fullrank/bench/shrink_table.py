"""What the runs of a comparison of shrinking methods say, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fullrank.bench.runs import Result
from fullrank.bench.shrink_entrants import BASELINE
from fullrank.bench.shrink_sizes import ShrinkSize
from fullrank.core.table import Table
from fullrank.evaluate.bootstrap import Interval, bootstrap_interval
from fullrank.optim.memory import human_bytes


@dataclass(frozen=True)
class Stage:
    """The quality of a shrunk model, before or after fine-tuning.

    Attributes
    ----------
    value
        Mean of the metric.
    change
        From the original's, with its 95 % interval over queries, images or sequences.
    against
        From the baseline's at the same share and stage; None of the baseline itself.
    cosine
        Of embeddings with the original's, where there are any.
    """

    value: float
    change: Interval
    against: Interval | None
    cosine: float | None


@dataclass(frozen=True)
class Row:
    """What was found of one method at one size; None where it was not measured.

    Attributes
    ----------
    method, share
        Which method, and what it was asked to keep.
    one_shot, tuned
        Its quality before and after fine-tuning.
    note
        Why there is no result, where there is none.
    kept, parameters, bytes, flops
        Share of the layers' parameters that is left; of the whole model: numbers, bytes of its
        files, operations on the example batch.
    speed
        Times as fast as the original, by precision.
    seconds, training_seconds
        CPU time of shrinking, calibration included, and of training.
    """

    method: str
    share: float
    one_shot: Stage | None = None
    tuned: Stage | None = None
    note: str = ""
    kept: float | None = None
    parameters: int | None = None
    bytes: int | None = None
    flops: int | None = None
    speed: Mapping[str, float] | None = None
    seconds: float | None = None
    training_seconds: float | None = None


Runs = Mapping[tuple[str, float], Result]
# What a run says of a model and of itself, under the names of the row's fields.
_MEASURED = ("kept", "parameters", "bytes", "flops", "speed", "seconds", "training_seconds")


def rows_of(original: Result, runs: Runs) -> list[Row]:
    """Return a row for each method and size, in the order of the runs."""
    return [
        Row(
            method,
            share,
            one_shot=_stage("one_shot", run, original, runs.get((BASELINE, share))),
            tuned=_stage("tuned", run, original, runs.get((BASELINE, share))),
            note=run.get("why", ""),
            **{key: run.get(key) for key in _MEASURED},
        )
        for (method, share), run in runs.items()
    ]


def _stage(name: str, run: Result, original: Result, baseline: Result | None) -> Stage | None:
    if name not in run:
        return None
    values = np.array(run[name]["values"])
    labels = original["clusters"]
    against = None
    if baseline is not None and baseline is not run and name in baseline:
        against = bootstrap_interval(values - np.array(baseline[name]["values"]), labels)
    change = bootstrap_interval(values - np.array(original["values"]), labels)
    return Stage(float(values.mean()), change, against, run[name]["cosine"])


@dataclass(frozen=True)
class Comparison:
    """A table for each subject.

    Attributes
    ----------
    size
        Of data, networks and steps.
    originals
        Subject -> what was measured of it as it is.
    rows
        Subject -> a row for each method and size.
    """

    size: ShrinkSize
    originals: Mapping[str, Result]
    rows: Mapping[str, Sequence[Row]]

    def table(self, subject: str, columns: Sequence[str] | None = None) -> Table:
        """Return the table of one subject, or some of its columns."""
        original = self.originals[subject]
        metric = original["metric"]
        value = statistics.fmean(original["values"])
        better = "lower" if original["lower_is_better"] else "higher"
        table = Table(
            list(_COLUMNS),
            [_cells(row, original) for row in self.rows[subject]],
            title=f"{subject}, size {self.size.name}: {metric} {value:.4f} of the original "
            f"({better} is better), {original['parameters']:,} parameters, "
            f"{human_bytes(original['bytes'])}",
            formats={name: form for name, form in _COLUMNS.items() if form is not None},
        )
        return table.only(*(columns or table.columns))

    def overview(self, subject: str) -> Table:
        """Return the quality of every method by size: in one shot, and fine-tuned."""
        cells = {(row.method, row.share): row for row in self.rows[subject]}
        shares = list(dict.fromkeys(share for _, share in cells))

        def quality(method: str, share: float) -> str:
            row = cells.get((method, share))
            stages = (row.one_shot, row.tuned) if row else ()
            found = [f"{stage.value:.4f}" if stage else "-" for stage in stages]
            return " / ".join(found) if any(stages) else "-"

        metric = self.originals[subject]["metric"]
        return Table(
            ["method", *(f"{share:.0%}" for share in shares)],
            [
                [method, *(quality(method, share) for share in shares)]
                for method in dict.fromkeys(method for method, _ in cells)
            ],
            title=f"{subject}: {metric} in one shot / fine-tuned, by the share of the layers' "
            "parameters that is kept",
        )

    def markdown(self) -> str:
        """Return all tables, and what the columns mean."""
        lines = []
        for subject in self.rows:
            lines += [self.overview(subject).markdown(), "", self.table(subject).markdown(), ""]
        return "\n".join([*lines, _NOTES])

    def to_json(self) -> dict[str, Any]:
        """Return JSON values: everything but the single queries' values."""
        return {
            "size": asdict(self.size),
            "originals": {
                name: {k: v for k, v in found.items() if k not in ("values", "clusters")}
                for name, found in self.originals.items()
            },
            "rows": {name: [asdict(row) for row in rows] for name, rows in self.rows.items()},
        }


_COLUMNS: dict[str, Any] = {
    "method": None,
    "asked": ".0%",
    "kept": ".1%",
    "one shot": ".4f",
    "change": None,
    "tuned": ".4f",
    "change, tuned": None,
    f"against {BASELINE}": None,
    "cosine": ".4f",
    "cosine, tuned": ".4f",
    "parameters": ",d",
    "bytes": human_bytes,
    "FLOPs": ".2f",
    "speed": ".2f",
    "speed, bfloat16": ".2f",
    "s to shrink": ".1f",
    "s to train": ".1f",
}

QUALITY = ("method", "asked", "one shot", "tuned", f"against {BASELINE}")
"""What of it fits a terminal."""

_NOTES = f"""\
asked, kept: share of the parameters of the layers that may be shrunk. one shot, tuned: before and
after the same steps of training for all (trp and maestro shrink by training, and have no one shot).
change: from the original, with a 95 % bootstrap interval; "against {BASELINE}" is the difference of
the tuned models, or of those in one shot where that is all there is, at the same share. FLOPs: of
the original's on an example batch. speed: times as fast as the original on it, in turns in one
process, CPU time. s: CPU time; shrinking counts the calibration. magnitude: its zeros count as
saved, but are stored and multiplied."""


def _cells(row: Row, original: Result) -> list[Any]:
    shot, tuned, speed = row.one_shot, row.tuned, row.speed or {}
    last = tuned or shot
    return [
        row.method,
        row.share,
        row.kept,
        shot and shot.value,
        str(shot.change) if shot else row.note,
        tuned and tuned.value,
        str(tuned.change) if tuned else (row.note if shot else ""),
        str(last.against) if last and last.against else (None if last else row.note),
        shot and shot.cosine,
        tuned and tuned.cosine,
        row.parameters,
        row.bytes,
        row.flops / original["flops"] if row.flops else None,
        speed.get("float32"),
        speed.get("bfloat16"),
        row.seconds,
        row.training_seconds,
    ]
