"""What a training run has written so far, whoever wrote it: measures by step.

Read are, in a run's folder: ``events.jsonl`` (from
:class:`~fullrank.spectra.RunLogCallback`), ``log.jsonl`` and ``training.json`` (``fullrank
train``), and of unfinished runs the newest checkpoint's ``progress.json`` or Hugging Face's
``trainer_state.json`` that can be read. What is cut off or damaged is left out and counted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from fullrank.core.errors import InputError
from fullrank.core.table import Table

EVENTS = "events.jsonl"
"""File that :class:`~fullrank.spectra.RunLogCallback` appends to."""

_RESULT = "training.json"
_LINES = (EVENTS, "log.jsonl")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_BARS = "▁▂▃▄▅▆▇█"
_NAMES = {"learning_rate": "lr", "rankme": "RankMe", "eval/rankme": "RankMe"}
# What a record holds beside measures.
_OTHER = frozenset({"kind", "step", "epoch", "seconds", "tokens", "took", "total_flos"})
# What Hugging Face's trainers log once, at the end.
_SUMMARY = "train_runtime"

Points = dict[int, float]
"""Step -> value."""


@dataclass
class RunLog:
    """Measures of a run over its steps.

    Attributes
    ----------
    folder
        Of the run.
    measures
        Name -> step -> value: loss, learning rate, development metric, RankMe and whatever else
        was logged.
    ranks
        Name of a weight matrix -> step -> effective rank; empty where none were measured.
    stopped
        Why the run ended; empty while it goes on, or when its log does not say.
    damaged
        Lines and files that could not be read.
    ended
        Step at which a trainer said that it was done; -1 before.
    starts
        Where trainers began or went on, as :class:`~fullrank.spectra.RunLogCallback` saw it: step,
        and time in seconds since 1970.

    Examples
    --------
    >>> log = RunLog(Path("run"), {"loss": {1: 2.0, 2: 1.0}})
    >>> log.table().rows[0][:3]
    ['loss', 1.0, 1.0]
    """

    folder: Path
    measures: dict[str, Points] = field(default_factory=dict)
    ranks: dict[str, Points] = field(default_factory=dict)
    stopped: str = ""
    damaged: int = 0
    ended: int = -1
    starts: list[tuple[int, float]] = field(default_factory=list)

    @property
    def last_step(self) -> int:
        """The last step that anything is known of."""
        known = [*self.measures.values(), *self.ranks.values()]
        return max((max(points) for points in known if points), default=0)

    def table(self) -> Table:
        """One row a measure: its last value, its range, and how it went.

        What never changed is left out.
        """
        moving = {n: p for n, p in self.measures.items() if len(set(p.values())) > 1}
        return Table(
            ["measure", "last", "lowest", "highest", "course"],
            [_row(name, points) for name, points in (moving or self.measures).items()],
            title=f"{self.folder.name}: step {self.last_step}"
            + (f", ended by {self.stopped}" if self.stopped else ""),
        )

    def rank_table(self) -> Table:
        """One row a weight matrix: its effective rank at the end, its range, its course."""
        formats = dict.fromkeys(["last", "lowest", "highest"], ".1f")
        return Table(
            ["matrix", "last", "lowest", "highest", "course"],
            [_row(name, points) for name, points in self.ranks.items()],
            title="Effective rank of the weights",
            formats=formats,
        )

    def add(self, name: str, step: int, value: Any) -> None:
        """Keep a number under a measure's name."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            self.measures.setdefault(_NAMES.get(name, name), {})[step] = float(value)

    def start(self, step: int, time: float = math.inf) -> None:
        """Forget what was logged beyond a step: a run begins there, or is gone on with."""
        for points in (*self.measures.values(), *self.ranks.values()):
            for late in [known for known in points if known > step]:
                del points[late]
        self.ended = -1
        self.starts.append((step, time))

    def fill(self, other: RunLog) -> None:
        """Take over what is known from elsewhere, where there is nothing yet."""
        for mine, theirs in ((self.measures, other.measures), (self.ranks, other.ranks)):
            for name, points in theirs.items():
                mine[name] = {**points, **mine.get(name, {})}
        self.ended = max(self.ended, other.ended)
        self.stopped = self.stopped or other.stopped


def read_run(folder: str | Path) -> RunLog:
    """Read everything that a run has logged so far.

    Raises
    ------
    InputError
        When there is no such folder, or nothing in it that is a log.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give that of a training run")
    log = RunLog(folder)
    found = False
    for name in _LINES:
        if (folder / name).is_file():
            found = True
            _read_lines(log, folder / name)
    for path in _states(folder):
        found = True
        if _read_state(log, path):
            break
    if not found:
        raise InputError(
            f"{folder} holds no log of a training run: none of {', '.join((*_LINES, _RESULT))}, "
            "no checkpoint-* with progress.json or trainer_state.json"
        )
    # Of a run that was gone on with, more follows.
    if not log.stopped and log.ended >= log.last_step:
        log.stopped = "its trainer"
    log.measures, log.ranks = _sorted(log.measures), _sorted(log.ranks)
    return log


def _sorted(measures: Mapping[str, Points]) -> dict[str, Points]:
    return {name: dict(sorted(points.items())) for name, points in measures.items() if points}


def _states(folder: Path) -> Iterator[Path]:
    """Files with a whole history in them, the longest first: the result, then the checkpoints'.

    The newest may be in the middle of being written, or of being deleted.
    """
    checkpoints = {
        int(match[1]): path
        for path in (*folder.glob("checkpoint-*"), *folder.glob("checkpoints/checkpoint-*"))
        if (match := _CHECKPOINT.fullmatch(path.name))
    }
    newest_first = [checkpoints[step] for step in sorted(checkpoints, reverse=True)]
    names = ("progress.json", "trainer_state.json")
    wanted = [folder / _RESULT, *(place / name for place in newest_first for name in names)]
    for path in (*wanted, *(folder / name for name in names)):
        if path.is_file():
            yield path


def _read_lines(log: RunLog, path: Path) -> None:
    # A line may be in the middle of being written, in the middle of a character too.
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
            _take(log, record)
        except (ValueError, KeyError, TypeError, AttributeError):
            log.damaged += bool(line.strip())


def _read_state(log: RunLog, path: Path) -> bool:
    """Take in a history; False, and counted as damaged, where it cannot be read."""
    told = RunLog(log.folder)
    try:
        values, written = json.loads(path.read_text(encoding="utf-8")), path.stat().st_mtime
        if path.name == "trainer_state.json":
            for record in values["log_history"]:
                _take(told, record)
        else:
            _take_history(told, values["history"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        log.damaged += 1
        return False
    if later := [step for step, time in log.starts if time > written]:
        told.start(min(later))  # what lies beyond is of before that
    # The names in the log's own lines are plainer than those of its history.
    named = [name for name in told.measures if name.startswith("dev ")]
    if named and named[0] != "dev metric" and "dev metric" in log.measures:
        log.measures[named[0]] = log.measures.pop("dev metric")
    log.fill(told)
    return True


def _take_history(log: RunLog, history: Mapping[str, Any]) -> None:
    """Take in that of a run of ``fullrank train``."""
    for record in history["steps"]:
        _take(log, record)
    for record in history["evaluations"]:
        _take(log, {**record, "kind": "dev"}, history["metric"])
    log.stopped = history["stopped"]


def _take(log: RunLog, record: Mapping[str, Any], metric: str = "metric") -> None:
    """Sort the numbers of one record under their measures."""
    step = int(record["step"])
    if record.get("kind") == "start":
        log.start(step, float(record.get("time", math.inf)))
        return
    if _SUMMARY in record:
        log.ended = step
        return
    if record.get("kind") == "ranks":
        for name, value in record["effective_rank"].items():
            log.ranks.setdefault(name, {})[step] = float(value)
        log.add("mean effective rank share", step, record.get("mean_share"))
        return
    for name, value in record.items():
        if name == "metric":
            log.add(f"dev {metric}", step, value)
        elif name not in _OTHER:
            log.add(name, step, value)


def _row(name: str, points: Points) -> list[Any]:
    values = list(points.values())
    finite = [value for value in values if math.isfinite(value)] or [math.nan]
    return [
        name,
        values[-1],
        min(finite),
        max(finite),
        sparkline(values),
    ]


def sparkline(values: list[float], width: int = 16) -> str:
    """Draw a course of values in one line of text; means where there are more than fit.

    >>> sparkline([0.0, 1.0, 2.0, 3.0])
    '▁▃▆█'
    """
    count = min(width, len(values))
    cuts = [round(i * len(values) / count) for i in range(count + 1)]
    parts = [values[a:b] for a, b in pairwise(cuts)]
    means = [sum(part) / len(part) for part in parts]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = (high - low) or 1.0
    return "".join(
        _BARS[round((mean - low) / span * (len(_BARS) - 1))] if math.isfinite(mean) else "×"
        for mean in means
    )
