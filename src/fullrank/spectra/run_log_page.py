"""A training run as a page of curves, and as scalars of TensorBoard."""

from __future__ import annotations

import html
import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.core.errors import require
from fullrank.core.files import atomic_write
from fullrank.spectra.curves import course_svg
from fullrank.spectra.page_style import envelope, facts

if TYPE_CHECKING:
    from fullrank.spectra.run_log import RunLog

_STYLE = """
.courses{display:grid;grid-template-columns:repeat(auto-fill,minmax(17.5rem,1fr));gap:1rem}
.courses figure{background:var(--soft);border-radius:.6rem;padding:.8rem;margin:0;min-width:0;
overflow-wrap:anywhere}
.courses svg{width:100%;height:auto;display:block}
"""


def write_page(log: RunLog, path: str | Path, *, refresh: int | None = None) -> Path:
    """Write a self-contained page: a curve for every measure, effective ranks of the weights.

    Parameters
    ----------
    log
        What was read.
    path
        File, written whole or not at all.
    refresh
        Seconds after which a browser that shows it reads it again; None for a run that ended.
    """
    body = _lead(log) + _measures(log) + _ranks(log)
    title = f"Run {log.folder.resolve().name}"
    return atomic_write(path, envelope(title, body, _STYLE, refresh=refresh).encode())


def _lead(log: RunLog) -> str:
    values = {"steps": f"{log.last_step:,}"}
    for name, points in log.measures.items():
        if name in ("loss", "RankMe") or name.startswith(("dev ", "eval", "reward")):
            values[f"{name}, last"] = f"{list(points.values())[-1]:.4g}"
    values["state"] = f"ended by {log.stopped}" if log.stopped else "no end in its log"
    damaged = (
        "" if not log.damaged else f"<p>{log.damaged} damaged lines or files were left out.</p>"
    )
    return facts(dict(list(values.items())[:8])) + damaged


def _measures(log: RunLog) -> str:
    """Curves of what moved; the rest has one value each and is listed."""
    moving = {n: p for n, p in log.measures.items() if len(set(p.values())) > 1}
    still = [
        f"{name} {next(iter(points.values())):.4g}"
        for name, points in log.measures.items()
        if name not in moving
    ]
    listed = f'<p class="dim">Always the same: {html.escape(", ".join(still))}.</p>'
    return f"<section><h2>Measures</h2>{_courses(moving)}{listed if still else ''}</section>"


def _ranks(log: RunLog) -> str:
    if not log.ranks:
        return ""
    untitled = replace(log.rank_table(), title="")
    return (
        "<section><h2>Effective rank of the weights</h2>"
        f'<div class="wide">{untitled.html()}</div>'
        f"<details><summary>Curves</summary>{_courses(log.ranks)}</details></section>"
    )


def _courses(series: dict[str, dict[int, float]]) -> str:
    figures = "".join(
        f"<figure><b>{html.escape(name)}</b>{course_svg(points, name)}<figcaption>"
        f"{len(points)} values, last {list(points.values())[-1]:.4g}</figcaption></figure>"
        for name, points in series.items()
    )
    return f'<div class="courses">{figures}</div>'


def write_tensorboard(log: RunLog, folder: str | Path) -> Path:
    """Write every measure as a scalar that TensorBoard shows; ranks under ``effective_rank/``.

    Raises
    ------
    MissingExtraError
        When ``tensorboard`` is not installed.
    """
    require("tensorboard", extra="tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(folder))
    try:
        write_scalars(log, writer)
    finally:
        writer.close()
    return Path(folder)


def write_scalars(log: RunLog, writer: Any) -> int:
    """Give every number to ``writer.add_scalar(tag, value, step)``; return how many there were."""
    ranks = {f"effective_rank/{name}": points for name, points in log.ranks.items()}
    count = 0
    for tag, points in {**log.measures, **ranks}.items():
        for step, value in points.items():
            if math.isfinite(value):
                writer.add_scalar(tag.replace(" ", "_"), value, step)
                count += 1
    return count
