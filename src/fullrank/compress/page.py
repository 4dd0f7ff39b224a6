"""What shrinking did, as a page: ranks, errors and times by layer, size against quality."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import nn

from fullrank.compress.curve import Candidate, Shrunk, curve_table
from fullrank.compress.layers_record import factorised
from fullrank.compress.report import report
from fullrank.core.files import atomic_write
from fullrank.core.plan import PlanEntry, RankPlan
from fullrank.core.table import Table
from fullrank.spectra.curves import QualityPoint, legend, quality_svg
from fullrank.spectra.heatmap import heatmap_svg
from fullrank.spectra.page_style import envelope, facts, figure_class


def write_page(
    model: nn.Module,
    plan: RankPlan,
    path: str | Path,
    *,
    name: str = "",
    found: Shrunk | None = None,
    curves: Mapping[str, Sequence[Candidate]] | None = None,
    metric: str = "",
    lower_is_better: bool = False,
    notes: Mapping[str, str] | None = None,
) -> Path:
    """Write a self-contained page on a shrunk model: no scripts, nothing loaded from elsewhere.

    Parameters
    ----------
    model, plan
        The shrunk model and its plan.
    path
        File, written whole or not at all.
    name
        Of the original.
    found
        What the search found, where there was one.
    curves
        Method -> every candidate measured with it; ``found``'s alone if None.
    metric, lower_is_better
        What was measured.
    notes
        More figures for the head of the page.

    Examples
    --------
    >>> import tempfile
    >>> from fullrank.compress import FractionOfBreakEven, factorize, make_plan
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> plan = make_plan(model, FractionOfBreakEven(0.5))
    >>> page = write_page(factorize(model, plan), plan, Path(tempfile.mkdtemp()) / "page.html")
    >>> "rank 4 of 16" in page.read_text()
    True
    """
    if curves is None:
        curves = {} if found is None else {"plans": found.curve}
    body = [
        _lead(model, plan, found, metric, notes or {}),
        _quality(curves, found, metric, lower_is_better),
        _ranks(plan),
        _errors(model),
        _times(plan),
        _figures(model, plan),
    ]
    title = f"{name or 'The model'}, shrunk"
    return atomic_write(path, envelope(title, "".join(body)).encode())


def _lead(
    model: nn.Module,
    plan: RankPlan,
    found: Shrunk | None,
    metric: str,
    notes: Mapping[str, str],
) -> str:
    savings = plan.savings()
    whole = sum(p.numel() for p in model.parameters())
    small = sum(1 for entry in plan.values() if entry.rank is not None)
    values = {
        "linear parameters kept": f"{savings.kept:.1%}",
        "linear parameters": _count(savings.planned),
        "before": _count(savings.dense),
        "parameters of the whole model": _count(whole),
        "layers factorised": f"{small} of {len(plan)}",
    }
    if found is not None:
        chosen = next(c for c in found.curve if c.plan == found.plan)
        values[metric or "metric"] = f"{chosen.value:.4g}"
        values["the original's"] = f"{found.reference:.4g}"
    return facts({**values, **notes})


def _count(number: int) -> str:
    return f"{number / 1e6:,.2f} M" if number >= 1e5 else f"{number:,}"


def _quality(
    curves: Mapping[str, Sequence[Candidate]],
    found: Shrunk | None,
    metric: str,
    lower_is_better: bool,
) -> str:
    if not any(curves.values()):
        return ""
    points = {
        name: [QualityPoint(c.kept, c.ratio, c.lower, c.holds) for c in curve]
        for name, curve in curves.items()
    }
    floor = None
    if found is not None:
        floor = 1 / found.floor if lower_is_better else found.floor
    what = html.escape(metric or "the metric")
    across = (
        f"{what} of the original divided by that of the shrunk model"
        if lower_is_better
        else f"{what} as a share of the original's (of an absolute floor, itself)"
    )
    tables = "".join(
        f'<h3>{html.escape(name)}</h3><div class="wide">{curve_table(curve).html()}</div>'
        for name, curve in curves.items()
    )
    svg = quality_svg(points, floor=floor, title="Size against quality")
    return (
        f'<section><h2>Size against quality</h2><figure class="fit">{svg}{legend(points)}'
        f"<figcaption>Across: share of the linear parameters kept. Up: {across}; higher is better. "
        "The bar under a dot reaches to the lower end of its one-sided 95 % interval; full dots "
        "hold the floor (dashed), hollow ones do not.</figcaption></figure>"
        f"<details><summary>Every plan measured</summary>{tables}</details></section>"
    )


def _ranks(plan: RankPlan) -> str:
    def share(entry: PlanEntry) -> float:
        return 1.0 if entry.rank is None else entry.rank / min(entry.matrix_shape)

    def describe(name: str) -> str:
        entry = plan[name]
        full = min(entry.matrix_shape)
        if entry.rank is None:
            return f"{name}: dense, rank {full}. {entry.reason}"
        return f"{name}: rank {entry.rank} of {full}. {entry.reason}"

    return _map(
        "Rank of each layer, as a share of full rank",
        {name: share(entry) for name, entry in plan.items()},
        "Projections down, layers across. 100 %: left dense.",
        describe=describe,
    )


def _errors(model: nn.Module) -> str:
    errors = {
        name: float(layer.error) for name, layer in factorised(model) if layer.error is not None
    }
    return _map(
        "Relative error of each layer",
        errors,
        "Squared error of the layer's outputs on the calibration data as a share of their variance "
        "(of its weight as a share of its square, for methods without data), before any recovery.",
        show=_small_share,
    )


def _small_share(share: float) -> str:
    """Enough digits to tell errors apart, few enough for a cell: 12%, 0.12%, 0.02%, 4e-05."""
    if 0 < share < 1e-4:
        return f"{share:.0e}"
    digits = 1 if share < 1e-3 else 2
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.{digits}g}%"


def _times(plan: RankPlan) -> str:
    timed = {
        name: entry.options["seconds"]["dense"] / entry.options["seconds"]["factorised"]
        for name, entry in plan.items()
        if "seconds" in entry.options
    }

    def describe(name: str) -> str:
        found = plan[name].options["seconds"]
        size = " x ".join(map(str, found["input"]))
        return (
            f"{name}: {found['dense'] * 1e3:.3g} ms dense, {found['factorised'] * 1e3:.3g} ms "
            f"factorised, on {size}"
        )

    return _map(
        "Measured speed-up of each layer",
        timed,
        "Time of the dense layer divided by that of its factors, on the machine that made the "
        "plan; where it is below 1 the layer was left dense.",
        show=lambda ratio: f"{ratio:.1f}x",
        describe=describe,
    )


def _map(
    title: str,
    values: Mapping[str, float],
    caption: str,
    *,
    show: Callable[[float], str] = "{:.0%}".format,
    describe: Callable[[str], str] | None = None,
) -> str:
    if not values:
        return ""
    svg = heatmap_svg(values, title=title, show=show, describe=describe)
    return (
        f'<section><h2>{html.escape(title)}</h2><figure class="{figure_class(svg)}">{svg}'
        f"<figcaption>{html.escape(caption)}</figcaption></figure></section>"
    )


def _figures(model: nn.Module, plan: RankPlan) -> str:
    why = Table(
        ["layer", "shape", "rank", "why"],
        [
            [n, f"{e.shape[0]} × {e.shape[1]}", "dense" if e.rank is None else e.rank, e.reason]
            for n, e in plan.items()
        ],
        title="The plan",
    )
    return (
        "<section><h2>All figures</h2><details><summary>Factorised layers</summary><div "
        f'class="wide">{report(model).html()}</div></details><details><summary>The plan, layer by '
        f'layer</summary><div class="wide">{why.html()}</div></details></section>'
    )
