"""Pictures of leaderboards: what is gained against what it costs."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fullrank.bench.leaderboard import Row
from fullrank.core.errors import require

# Readable on white and on near-black alike.
_INK, _POINT = "#7d8590", "#3b82f6"
# Where a name may stand beside its point, in points of type: the nearest free place is taken.
_PLACES = [
    (side * (6 + reach / 2), height)
    for reach in (0, 12, 24, 36, 48)
    for height in ((0,) if reach == 0 else (reach, -reach))
    for side in (1, -1)
]


@dataclass(frozen=True)
class Point:
    """A contestant: where it is, its spread upwards and downwards, and its name."""

    x: float
    y: float
    spread: float
    name: str


def loss_against_state(rows: Sequence[Row], title: str) -> bytes:
    """Draw bits per byte over bytes of state, with the spread over seeds, as SVG."""
    points = [
        Point(row.state_bytes / 2**20, row.bits_per_byte, row.spread or 0.0, row.optimizer)
        for row in rows
        if row.bits_per_byte is not None and row.state_bytes is not None
    ]
    return scatter(points, title, ("optimizer state, MiB", "dev bits per byte"))


def scatter(
    points: Sequence[Point], title: str, labels: tuple[str, str], *, log: bool = False
) -> bytes:
    """Draw named points with their spread as SVG; ``log`` is of the horizontal axis."""
    matplotlib = require("matplotlib", extra="plot")
    figures = require("matplotlib.figure", extra="plot")
    agg = require("matplotlib.backends.backend_agg", extra="plot")
    # Text stays text, and ids do not change between runs.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fullrank"}):
        figure = figures.Figure(figsize=(7.2, 4.4))
        canvas = agg.FigureCanvasAgg(figure)
        figure.subplots_adjust(left=0.1, right=0.97, bottom=0.13, top=0.92)
        axes = _axes(figure, title, labels)
        if log:
            axes.set_xscale("log")
            across = [point.x for point in points]
            if across and max(across) < min(across) * 1.001:
                # A single place has no width to scale to.
                axes.set_xlim(min(across) / 2, max(across) * 2)
        for point in points:
            axes.errorbar(
                point.x, point.y, yerr=point.spread, fmt="o", ms=5, lw=1, capsize=2, color=_POINT
            )
        axes.autoscale_view()
        _name_points(axes, canvas.get_renderer(), [(p.x, p.y, p.name) for p in points])
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()


def _axes(figure: Any, title: str, labels: tuple[str, str]) -> Any:
    axes = figure.add_subplot()
    axes.set_title(title, color=_INK, fontsize=9)
    axes.set_xlabel(labels[0], color=_INK, fontsize=9)
    axes.set_ylabel(labels[1], color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8)
    axes.margins(x=0.18, y=0.12)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_INK)
    axes.grid(color=_INK, alpha=0.2, lw=0.5)
    return axes


def _name_points(axes: Any, renderer: Any, points: Sequence[tuple[float, float, str]]) -> None:
    """Write each name where it covers neither a point nor another name, if there is such a place.

    What stands away from its point is joined to it by a line.
    """
    transforms = require("matplotlib.transforms", extra="plot")
    text_of = require("matplotlib.text", extra="plot").Text.get_window_extent
    taken = []
    for x, y, _ in points:
        across, up = axes.transData.transform((x, y))
        taken.append(transforms.Bbox.from_bounds(across - 4, up - 4, 8, 8))
    for x, y, name in points:
        for dx, dy in _PLACES:
            line = {"arrowstyle": "-", "color": _INK, "lw": 0.5, "shrinkB": 3, "shrinkA": 0}
            label = axes.annotate(
                name,
                (x, y),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="left" if dx > 0 else "right",
                va="center",
                fontsize=8,
                color=_INK,
                arrowprops=line if dy else None,
            )
            label.update_positions(renderer)
            box = text_of(label, renderer)
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            axes.add_artist(label)
        taken.append(box)
