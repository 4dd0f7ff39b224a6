"""The comparison of adapters as tables: what the runs of one task say."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fullrank.bench.adapter_scenes import Measure
from fullrank.bench.adapter_sizes import AdapterSize
from fullrank.bench.runs import Result
from fullrank.core.table import Cell, Table
from fullrank.optim.memory import human_bytes


@dataclass(frozen=True)
class AdapterRow:
    """What was found of one way to fine-tune; None where it was not measured.

    Attributes
    ----------
    name, title
        Of the way.
    lr, note
        The best rate, and what one should know of it.
    loss
        Mean training loss of the last tenth of the steps, over all seeds.
    means, spreads
        Mean and standard deviation over the seeds of what is measured afterwards.
    trained, saved_bytes, peak_bytes
        Trainable parameters; bytes on disk; most bytes alive in a step.
    step_ms, start_s
        Milliseconds of a step, and seconds until the adapter is on.
    seeds
        How many.
    """

    name: str
    title: str
    lr: float | None = None
    note: str = ""
    loss: float | None = None
    means: tuple[float, ...] = ()
    spreads: tuple[float, ...] = ()
    trained: int | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    step_ms: float | None = None
    start_s: float | None = None
    seeds: int = 0


def adapter_row(
    name: str,
    title: str,
    lr: float | None,
    note: str,
    runs: Sequence[Result],
    start: Result | None,
    step: Result | None,
) -> AdapterRow:
    """Put together what was found of one way to fine-tune.

    ``runs`` are those at the best rate, one a seed.
    """
    whole = [run for run in runs if run["score"] is not None]
    if len(whole) < len(runs):
        note = f"diverged on {len(runs) - len(whole)} of {len(runs)} seeds"
    values = list(zip(*(run["measures"] for run in whole), strict=True))
    start, step = start or {}, step or {}
    return AdapterRow(
        name,
        title,
        lr,
        note,
        statistics.fmean(run["loss"] for run in whole) if whole else None,
        tuple(statistics.fmean(v) for v in values),
        tuple(statistics.stdev(v) for v in values) if len(whole) > 1 else (),
        start.get("trained"),
        start.get("bytes"),
        start.get("peak_bytes"),
        step.get("step_ms"),
        start.get("start_s"),
        len(whole),
    )


@dataclass(frozen=True)
class AdapterBoard:
    """The table of one task.

    Attributes
    ----------
    size
        The budget.
    measures
        What is measured after a run.
    base
        A value for each of the untouched base.
    rows
        In the order of the methods.
    device
        What it ran on.
    """

    size: AdapterSize
    measures: Sequence[Measure]
    base: Sequence[float] = ()
    rows: Sequence[AdapterRow] = ()
    device: str = "cpu"

    @property
    def ranked(self) -> list[AdapterRow]:
        """The best first, by the first measure; those without one last."""
        sign = 1 if self.measures[0].lower_is_better else -1
        return sorted(self.rows, key=lambda r: (not r.means, sign * r.means[0] if r.means else 0))

    def table(self) -> Table:
        """Return how well each way did, the untouched base last."""
        names = [measure.name for measure in self.measures]
        cells: list[list[Cell]] = [
            [
                row.title,
                _rate(row),
                row.loss,
                *(_with_spread(row, i, m) for i, m in enumerate(self.measures)),
                row.seeds,
            ]
            for row in self.ranked
        ]
        if self.base:
            values = [format(v, m.spec) for v, m in zip(self.base, self.measures, strict=True)]
            cells.append(["untouched", None, None, *values, None])
        size = self.size
        title = (
            f"{size.task}, {size.name} size: {size.steps} steps of {size.batch}, rank {size.rank}, "
            f"{len(size.rates)} rates, {self.device}"
        )
        return Table(["way", "lr", "loss", *names, "seeds"], cells, title, {"loss": ".4f"})

    def costs(self) -> Table:
        """Return what each way takes, in the order of :meth:`table`."""
        cells = [
            [
                row.title,
                row.trained,
                row.saved_bytes,
                row.peak_bytes,
                row.step_ms,
                row.start_s,
            ]
            for row in self.ranked
        ]
        return Table(["way", *_COSTS], cells, f"{self.size.task}: what it takes", _COSTS)

    def markdown(self) -> str:
        """Return both tables and what their columns mean."""
        tables = [self.table(), self.costs()]
        return "\n\n".join([*(f"{t.title}\n\n{t.markdown()}" for t in tables), _NOTES])

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "size": {**asdict(self.size), "base": dict(self.size.base)},
            "measures": [measure.name for measure in self.measures],
            "base": list(self.base),
            "rows": [asdict(row) for row in self.ranked],
            "device": self.device,
        }


def _with_spread(row: AdapterRow, index: int, measure: Measure) -> str | None:
    if not row.means:
        return None
    text = format(row.means[index], measure.spec)
    return f"{text} ± {row.spreads[index]:{measure.spec}}" if row.spreads else text


def _rate(row: AdapterRow) -> str:
    rate = "" if row.lr is None else f"{row.lr:g}"
    return f"{rate} ({row.note})" if rate and row.note else rate or row.note


_COSTS: dict[str, str | Callable[[Any], str]] = {
    "trained": ",d",
    "on disk": human_bytes,
    "peak": human_bytes,
    "ms a step": ".2f",
    "start, s": ".3f",
}

_NOTES = """\
lr: the best of a grid that is the same for all, by the dev part, on the first seed; "edge": it is
the first or the last of the grid. loss: of training, mean of the last tenth of the steps. Then, of
the weights that were best on the dev part (the base's own among them), mean ± standard deviation
over the seeds, on the test part. trained: parameters. on disk: the adapter as it is saved with its
settings, or all weights. peak: most bytes of tensors alive at once in a training step, the base's
among them. ms a step: all in turns in one process, mean over a period of refreshes, and start:
what the method computes before the first step (both CPU time on a CPU)."""
