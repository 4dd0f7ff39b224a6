"""The report's pictures, as SVG text that stands inside a page."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fullrank.core.errors import require

# Readable on white and on near-black alike.
_INK = "#7d8590"
_COLOURS = ("#3b82f6", "#e8833a", "#2da44e", "#a371f7")


@dataclass(frozen=True)
class Series:
    """Points of one line; ``low`` and ``high`` draw a bar through each."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    level: tuple[float, str] | None = None,
    percent_x: bool = False,
    markers: bool = True,
) -> str:
    """Draw lines over a common x axis.

    Parameters
    ----------
    series
        What to draw.
    x_label, y_label
        What the axes mean, with units.
    level
        A horizontal line and what it stands for.
    percent_x
        Show x as a percentage.
    markers
        Show each point.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    with _axes(x_label, y_label) as (axes, drawn):
        for colour, s in zip(_COLOURS * len(series), series, strict=False):
            style = "--" if s.dashed else "-"
            axes.plot(
                s.x,
                s.y,
                style,
                color=colour,
                marker="o" if markers else "",
                ms=3.5,
                lw=1.6,
                label=s.name,
            )
            if s.low is not None and s.high is not None:
                axes.vlines(s.x, s.low, s.high, color=colour, lw=1, alpha=0.7)
        if level is not None:
            axes.axhline(level[0], color=_INK, lw=1, ls=":")
            axes.annotate(
                level[1], (1, level[0]), xycoords=("axes fraction", "data"), ha="right",
                va="bottom", color=_INK, fontsize=8,
            )  # fmt: skip
        if percent_x:
            ticker = require("matplotlib.ticker", extra="plot")
            axes.xaxis.set_major_formatter(ticker.PercentFormatter(1.0, decimals=0))
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=_INK)
    return drawn[0]


@contextmanager
def _axes(x_label: str, y_label: str) -> Iterator[tuple[Any, list[str]]]:
    """Yield axes to draw on, and a list that holds the SVG afterwards."""
    matplotlib = require("matplotlib", extra="plot")
    figures = require("matplotlib.figure", extra="plot")
    drawn: list[str] = []
    # Text stays text (selectable, in the page's font) and ids do not change between runs.
    style = {"svg.fonttype": "none", "svg.hashsalt": "fullrank", "font.family": "sans-serif"}
    with matplotlib.rc_context(style):
        figure = figures.Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.add_subplot()
        axes.set_xlabel(x_label, color=_INK, fontsize=9)
        axes.set_ylabel(y_label, color=_INK, fontsize=9)
        axes.tick_params(colors=_INK, labelsize=8)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(_INK)
        axes.grid(color=_INK, alpha=0.2, lw=0.5)
        yield axes, drawn
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    drawn.append(text[text.index("<svg") :])
