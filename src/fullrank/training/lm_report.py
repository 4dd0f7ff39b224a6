"""What a run leaves to look at: a line for every step and evaluation, and a plot."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from fullrank.training.history import TrainingHistory

LOG = "log.jsonl"
TABLE = "log.csv"
PLOT = "training.svg"


def write_log(history: TrainingHistory, folder: Path) -> None:
    """Write ``log.jsonl`` (steps and evaluations) and ``log.csv`` (steps)."""
    records = [("step", r) for r in history.steps] + [("dev", r) for r in history.evaluations]
    records.sort(key=lambda pair: (pair[1].step, pair[0] == "dev"))
    lines = [
        json.dumps({"kind": kind, **{name: getattr(record, name) for name in record.__slots__}})
        for kind, record in records
    ]
    (folder / LOG).write_text("\n".join(lines) + "\n", encoding="utf-8")
    with (folder / TABLE).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        names = ["step", "loss", "lr", "grad_norm", "seconds", "tokens"]
        writer.writerow(names)
        writer.writerows([getattr(step, name) for name in names] for step in history.steps)


def write_plot(history: TrainingHistory, folder: Path) -> bool:
    """Draw the loss and the development metric; returns False where matplotlib is absent."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return False
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [s.step for s in history.steps]
    losses = [s.loss for s in history.steps]
    left.plot(steps, losses, color="#9db8d9", linewidth=0.8)
    left.plot(steps, _smooth(losses), color="#0a58ca")
    left.set(xlabel="step", ylabel="training loss, nats a token")
    at = [e.step for e in history.evaluations]
    right.plot(at, [e.metric for e in history.evaluations], "o-", color="#0a58ca", markersize=3)
    right.set(xlabel="step", ylabel=f"dev {history.metric}")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / PLOT)
    return True


def _smooth(values: list[float]) -> list[float]:
    """Exponential mean over about a fiftieth of the run, unbiased at the start."""
    keep = 1 - 1 / max(1, len(values) / 50)
    mean = weight = 0.0
    smooth = []
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smooth.append(mean / weight)
    return smooth
