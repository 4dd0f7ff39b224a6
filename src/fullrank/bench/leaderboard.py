"""The leaderboard: what the runs of all entrants say, as tables."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fullrank.bench.entrants import BASELINE
from fullrank.bench.runs import Result
from fullrank.bench.sizes import Size
from fullrank.core.table import Table
from fullrank.optim.memory import human_bytes

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class Row:
    """What was found of one optimizer on one text; None where it was not measured.

    Attributes
    ----------
    optimizer
        Its name.
    lr
        The body's best learning rate.
    note
        What one should know of it.
    bits_per_byte, spread
        Mean and standard deviation over the seeds, on the dev part, after the last step.
    state_bytes, peak_bytes
        Of the optimizer's state; of all tensors alive at once in a step.
    passes_ms, optimizer_ms
        Of a training step: forward and backward pass, and the optimizer's part.
    steps_to_baseline
        Steps after which the mean curve over seeds is down at AdamW's last loss.
    steps, tokens, seeds
        Of a run, and how many there are at the best rate.
    """

    optimizer: str
    lr: float | None = None
    note: str = ""
    bits_per_byte: float | None = None
    spread: float | None = None
    state_bytes: int | None = None
    peak_bytes: int | None = None
    passes_ms: float | None = None
    optimizer_ms: float | None = None
    steps_to_baseline: float | None = None
    steps: int | None = None
    tokens: int | None = None
    seeds: int = 0

    @property
    def step_ms(self) -> float | None:
        """Milliseconds of a whole training step."""
        if self.passes_ms is None or self.optimizer_ms is None:
            return None
        return self.passes_ms + self.optimizer_ms

    @property
    def seconds_to_baseline(self) -> float | None:
        """Seconds of training to AdamW's last loss: steps times measured milliseconds."""
        if self.steps_to_baseline is None or self.step_ms is None:
            return None
        return self.steps_to_baseline * self.step_ms / 1e3


@dataclass(frozen=True)
class Found:
    """Everything that was found of one optimizer on one text.

    Attributes
    ----------
    optimizer
        Its name.
    lr
        Best rate, or None while the grid is not done, or where all diverged.
    runs
        What the runs at that rate found, one a seed.
    note
        What one should know of the search for the rate.
    time, memory
        What a step takes, where it was measured.
    """

    optimizer: str
    lr: float | None
    runs: Sequence[Result]
    note: str = ""
    time: Result | None = None
    memory: Result | None = None

    @property
    def curve(self) -> Curve:
        """Mean over the seeds of step and bits per byte, where all have been measured."""
        points: dict[float, list[float]] = {}
        for run in self.runs:
            for step, value in run.get("curve", ()):
                points.setdefault(step, []).append(value)
        whole = {s: values for s, values in points.items() if len(values) == len(self.runs)}
        return [(step, statistics.fmean(values)) for step, values in sorted(whole.items())]

    def row(self, target: float | None) -> Row:
        """Return the row of the table; ``target`` is AdamW's loss."""
        losses = [run["loss"] for run in self.runs if run["loss"] is not None]
        failed = len(self.runs) - len(losses)
        note = self.note
        if failed:
            note = f"diverged on {failed} of {len(self.runs)} seeds"
        reached = None if target is None or failed else steps_to(self.curve, target)
        time, memory = self.time or {}, self.memory or {}
        whole = next((run for run in self.runs if run["loss"] is not None), {})
        return Row(
            self.optimizer,
            self.lr,
            note,
            None if failed or not losses else statistics.fmean(losses),
            None if failed or len(losses) < 2 else statistics.stdev(losses),
            max((run["state_bytes"] for run in self.runs if "state_bytes" in run), default=None),
            memory.get("peak_bytes"),
            time.get("passes"),
            time.get("optimizer"),
            reached,
            whole.get("steps"),
            whole.get("tokens"),
            len(losses),
        )


def steps_to(curve: Curve, target: float) -> float | None:
    """Steps after which a curve is down at a value, straight lines between its points.

    >>> steps_to([(0, 8.0), (100, 4.0), (200, 3.0)], 3.5)
    150.0
    >>> steps_to([(0, 8.0), (100, 4.0)], 3.5) is None
    True
    """
    before: tuple[float, float] | None = None
    for step, value in curve:
        if value <= target:
            if before is None or before[1] <= value:
                return float(step)
            share = (before[1] - target) / (before[1] - value)
            return before[0] + share * (step - before[0])
        before = step, value
    return None


def rows_of(found: Sequence[Found]) -> list[Row]:
    """Return a row for each optimizer, the lowest loss first, those without one last."""
    baseline = next((f for f in found if f.optimizer == BASELINE), None)
    target = None if baseline is None else baseline.row(None).bits_per_byte
    rows = [f.row(target) for f in found]
    return sorted(rows, key=lambda r: (r.bits_per_byte is None, r.bits_per_byte or 0.0))


@dataclass(frozen=True)
class Leaderboard:
    """One table for each text.

    Attributes
    ----------
    size
        Of model and runs.
    rows
        Name of a text -> rows, best first.
    manifests
        Name of a text -> where it came from.
    device
        What it ran on.
    """

    size: Size
    rows: Mapping[str, Sequence[Row]]
    manifests: Mapping[str, Mapping[str, Any]]
    device: str = "cpu"

    def table(self, text: str) -> Table:
        """Return the table of one text."""
        rows = self.rows[text]
        baseline = next((r.state_bytes for r in rows if r.optimizer == BASELINE), None)
        cells = [
            [
                row.optimizer,
                _rate(row),
                row.bits_per_byte,
                row.spread,
                row.state_bytes,
                row.state_bytes / baseline if row.state_bytes and baseline else None,
                row.peak_bytes,
                row.step_ms,
                row.optimizer_ms,
                row.seconds_to_baseline,
                row.seeds,
                row.steps,
                row.tokens,
            ]
            for row in rows
        ]
        size = self.size
        return Table(
            list(_COLUMNS),
            cells,
            title=f"{text}, size {size.name}: Llama over bytes, width {size.width}, "
            f"{size.layers} layers, {size.batch} x {size.context} bytes a step, {self.device}",
            formats={name: spec for name, spec in _COLUMNS.items() if spec is not None},
        )

    def markdown(self) -> str:
        """Return all tables, what the columns mean, and where the texts came from."""
        lines = []
        for text in self.rows:
            lines += [self.table(text).markdown(), ""]
            facts = ", ".join(f"{k}: {_plain(v)}" for k, v in self.manifests[text].items())
            lines += [f"{text}: {facts}", ""] if facts else []
        return "\n".join([*lines, _NOTES])

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "size": asdict(self.size),
            "device": self.device,
            "rows": {text: [asdict(row) for row in rows] for text, rows in self.rows.items()},
            "texts": {text: dict(manifest) for text, manifest in self.manifests.items()},
        }


_COLUMNS = {
    "optimizer": None,
    "lr": None,
    "bits per byte": ".4f",
    "std": ".4f",
    "state": human_bytes,
    f"/ {BASELINE}'s": ".2f",
    "peak": human_bytes,
    "ms a step": ".2f",
    "optimizer's": ".2f",
    f"s to {BASELINE}'s": ".1f",
    "seeds": None,
    "steps": ",d",
    "tokens": ",d",
}

_NOTES = f"""\
lr: of the matrices in the blocks, the best of the grid on the first seed; all else has the same
multiple of it with every optimizer, and what has a rank has the same one. "edge": the best is the
first or the last of the grid. bits per byte: on the dev part after the last step, mean and standard
deviation over seeds. state: the optimizer's, at the end. peak: most bytes of tensors alive at once
in a training step. ms a step: of forward, backward and the optimizer's part, all optimizers in
turns in one process, averaged over a period of their refreshes (CPU time on a CPU). s to
{BASELINE}'s: steps until the mean curve is down at {BASELINE}'s last loss, times ms a step.
MKORH is timed before it changes to its inner optimizer, MKOR early, while its factors are small."""


def _rate(row: Row) -> str:
    rate = "" if row.lr is None else f"{row.lr:g}"
    return f"{rate} ({row.note})" if rate and row.note else rate or row.note


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)
