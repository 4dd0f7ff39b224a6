"""A picture of a comparison of shrinking methods: quality against size, a line a method."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

from fullrank.bench.shrink_table import Row
from fullrank.core.errors import require

# Readable on white and on near-black alike.
_INK = "#7d8590"


def quality_against_size(rows: Sequence[Row], title: str, metric: str) -> bytes:
    """Draw the change of a metric over the share kept, with intervals, as SVG.

    On the left in one shot, on the right after fine-tuning.
    """
    matplotlib = require("matplotlib", extra="plot")
    figures = require("matplotlib.figure", extra="plot")
    # Text stays text, and ids do not change between runs.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fullrank"}):
        figure = figures.Figure(figsize=(9.6, 4.4), layout="constrained")
        panes = figure.subplots(1, 2, sharey=True)
        for axes, stage in zip(panes, ("one_shot", "tuned"), strict=True):
            _draw(axes, rows, stage)
            _dress(axes, f"{title}, {stage.replace('_', ' ')}")
        panes[0].set_ylabel(f"change of {metric}", color=_INK, fontsize=9)
        # Those that shrink by training are on the right alone.
        lines = {line.get_label(): line for axes in panes for line in axes.containers}
        figure.legend(
            lines.values(), lines.keys(), loc="outside right", fontsize=8, labelcolor=_INK,
            frameon=False,
        )  # fmt: skip
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _draw(axes: Any, rows: Sequence[Row], stage: str) -> None:
    for number, method in enumerate(dict.fromkeys(row.method for row in rows)):
        found = [(row.kept, getattr(row, stage)) for row in rows if row.method == method]
        points = [(kept, quality) for kept, quality in found if kept is not None and quality]
        if not points:
            continue
        changes = [quality.change for _, quality in points]
        axes.errorbar(
            [100 * kept for kept, _ in points],
            [change.mean for change in changes],
            yerr=[
                [change.mean - change.lower for change in changes],
                [change.upper - change.mean for change in changes],
            ],
            fmt="o-", ms=4, lw=1.2, elinewidth=0.6, color=f"C{number}", label=method,
        )  # fmt: skip


def _dress(axes: Any, title: str) -> None:
    axes.set_title(title, color=_INK, fontsize=9)
    axes.set_xlabel("parameters of the layers kept, %", color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.axhline(0, color=_INK, lw=0.8, ls="--")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    axes.grid(color=_INK, alpha=0.2, lw=0.5)
