"""The X-ray as a page: something to look at first, and to read where one wants to know more.

Without a script: a cell of the heat map is a link to the sheet of its matrix, and the style shows
only the sheet that the address names.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from fullrank.core.errors import InputError
from fullrank.core.table import Table
from fullrank.spectra.curves import legend
from fullrank.spectra.page_sheets import sheet
from fullrank.spectra.page_style import envelope, facts, figure_class
from fullrank.spectra.planning_suggestions import Suggestion, suggestions

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fullrank.core.plan import Purpose
    from fullrank.spectra.report import ModelReport


def page(report: ModelReport) -> str:
    """Return the whole page."""
    found = report.xray
    title = f"X-ray of {found.model}"
    if report.other is not None:
        title += f" and {report.other.model}"
    places = {name: f"m{number}" for number, name in enumerate(found)}
    chosen = "".join(
        f':root:has(#{place}:target) a[href="#{place}"] rect'
        "{stroke:var(--ink);stroke-width:2.5}\n"
        for place in places.values()
    )
    try:
        plans: Mapping[Purpose, Suggestion] = suggestions(found)
    except InputError:
        # A model that is factored throughout, or has embeddings only: nothing to plan.
        plans = {}
    parts = [
        _lead(report),
        _maps(report, places, plans),
        _energy(report),
        _activated(report),
        _compared(report),
        _flawed(report),
        _planned(plans),
        _tables(report),
    ]
    return envelope(title, "".join(parts), chosen)


def _lead(report: ModelReport) -> str:
    xray = report.xray
    linear = [m for m in xray.values() if m.kind == "linear"]
    kind, meant = ("linear layer", linear) if linear else ("matrix", list(xray.values()))
    low, high = min(meant, key=lambda m: m.share), max(meant, key=lambda m: m.share)
    values = {
        "weight matrices": str(len(xray)),
        "parameters in them": f"{xray.parameters / 1e6:,.1f} M",
        "mean effective rank": f"{xray.mean_share:.0%} of full",
        f"lowest {kind}": f"{low.share:.0%}",
        f"highest {kind}": f"{high.share:.0%}",
    }
    notes = {f"lowest {kind}": low.name, f"highest {kind}": high.name}
    if len(meant) < len(xray):
        # Tables of embeddings are of another kind: few positions span few directions.
        notes["mean effective rank"] = f"over {len(meant)} linear layers"
    if report.other is not None:
        values[f"parameters of {report.other.model}"] = f"{report.other.parameters / 1e6:,.1f} M"
    return (
        "<p>How much of its rank each weight matrix really uses. The effective rank is the "
        "exponential of the entropy of the singular values: the number of equally strong "
        f"directions that would be as spread out.</p>"
        f"{facts(values, notes)}"
    )


def _maps(report: ModelReport, places: dict[str, str], plans: Mapping[Purpose, Suggestion]) -> str:
    xray, other = report.xray, report.other
    sheets = "".join(sheet(report, name, place, plans) for name, place in places.items())

    def link(name: str) -> str:
        return f"#{places[name]}"

    if other is None:
        maps = _map(xray.heatmap_svg(link))
    else:
        # One scale for both, so that equal colours are equal shares.
        shares = [m.share for x in (xray, other) for m in x.values() if m.kind == "linear"]
        span = (min(shares, default=0.0), max(shares, default=1.0))
        reachable = {name: m for name, m in other.items() if name in places}
        beside = type(other)(reachable.values(), model=other.model)
        maps = _map(xray.heatmap_svg(link, span), xray.model)
        maps += _map(beside.heatmap_svg(link, span), other.model)
    return (
        '<section><h2>Effective rank, as a share of full rank</h2><div class="duo"><div>'
        f'{maps}<p class="dim">Projections down, layers across. Dark: few directions carry the '
        "matrix. Colours span the layers; a matrix outside them takes the nearest end. Choose a "
        "cell to see its spectrum.</p></div>"
        '<aside class="stage" aria-label="The chosen matrix"><p class="hint dim">Choose a cell of '
        f"the map: its spectrum is shown here.</p>{sheets}</aside></div></section>"
    )


def _map(svg: str, title: str = "") -> str:
    heading = f"<h3>{html.escape(title)}</h3>" if title else ""
    return f'{heading}<figure class="{figure_class(svg)}">{svg}</figure>'


def _energy(report: ModelReport) -> str:
    xray = report.xray
    return (
        "<section><h2>Energy held by the leading directions</h2>"
        f'<figure class="fit">{xray.energy_svg()}{legend(xray.by_projection())}<figcaption>Share '
        "of the squared singular values (up) against share of the rank (across); dotted: 90, 95 "
        "and 99 %. A straight diagonal is a matrix that low rank does not fit.</figcaption>"
        "</figure></section>"
    )


def _activated(report: ModelReport) -> str:
    if not report.activations:
        return ""
    from fullrank.spectra.heatmap import heatmap_svg

    places = {name: f"#m{number}" for number, name in enumerate(report.xray)}
    shares = {
        name: s.effective_rank / len(s) for name, s in report.activations.items() if name in places
    }
    svg = heatmap_svg(shares, title="Effective rank of the layers' inputs", link=places.__getitem__)
    return (
        "<section><h2>What flows through the layers</h2>"
        f'<figure class="{figure_class(svg)}">{svg}<figcaption>'
        "Effective rank of each layer's inputs over the texts given, as a share of their width; "
        "neither centred nor scaled, one direction may be a common mean. Where it is far below "
        "that of the weights, a low rank that follows the data loses less than one that follows "
        "the weights.</figcaption></figure></section>"
    )


def _compared(report: ModelReport) -> str:
    if report.other is None or not report.overlaps:
        return ""
    from fullrank.spectra.heatmap import heatmap_svg

    places = {name: f"#m{number}" for number, name in enumerate(report.xray)}

    def describe(name: str) -> str:
        found = report.overlaps[name]
        return (
            f"{name}: {found.left_share:.1%} on the left, {found.right_share:.1%} on the right, of "
            f"{found.rank} directions (by chance {found.by_chance[0]:.1%}, "
            f"{found.by_chance[1]:.1%})"
        )

    svg = heatmap_svg(
        {n: (o.left_share + o.right_share) / 2 for n, o in report.overlaps.items()},
        title="Overlap of the leading subspaces",
        describe=describe,
        link=places.__getitem__,
        span=(0.0, 1.0),
    )
    absent = [name for name in report.xray if name not in report.overlaps]
    note = "" if not absent else f" Not compared: {', '.join(absent)}."
    return (
        "<section><h2>What both models share</h2>"
        f'<figure class="{figure_class(svg)}">{svg}<figcaption>Of the leading directions of each '
        "matrix (those that hold half its energy, no more than either model stores), the share "
        "that lies in the other model's leading subspace: the mean squared cosine of the "
        "principal angles, left "
        f"and right singular subspaces averaged. 100 %: the same subspace.{html.escape(note)}"
        "</figcaption></figure><details><summary>Overlap, matrix by matrix</summary>"
        f'<div class="wide">{report.overlap_table().html()}</div></details>'
        "<details><summary>Ranks before and after</summary>"
        f'<div class="wide">{report.xray.compare(report.other).html()}</div></details></section>'
    )


def _flawed(report: ModelReport) -> str:
    if not report.flaws:
        return ""
    table = report.flaw_table()
    count = len(report.flaws) + len(report.other_flaws)
    if table.rows:
        shown = f'<div class="wide">{table.html()}</div>'
    else:
        shown = (
            f"<p>None: every singular direction of the {count} matrices is above the "
            "rounding of the stored numbers, and no row or column repeats another.</p>"
        )
    return (
        f"<section><h2>Dead and duplicated directions</h2>{shown}"
        '<p class="dim">Dead: a singular value no larger than what rounding the stored numbers '
        "adds. Zero: a row or column below a millionth of the median length. Repeated: parallel "
        "to an earlier one, or opposite, with a cosine of at least 0.999.</p></section>"
    )


def _planned(plans: Mapping[Purpose, Suggestion]) -> str:
    if not plans:
        return ""
    cards = "".join(_card(purpose, suggestion) for purpose, suggestion in plans.items())
    ranks = Table(
        ["matrix", "shape", *(s.title for s in plans.values())],
        [
            [name, f"{e.shape[0]} × {e.shape[1]}", *(_rank(s, name) for s in plans.values())]
            for name, e in next(iter(plans.values())).plan.items()
        ],
        title="Suggested ranks",
    )
    return (
        f'<section><h2>Ranks to start from</h2><div class="plans">{cards}</div>'
        '<p class="dim">From the weights alone, as points to start from. What a smaller rank costs '
        "in quality has to be measured: fullrank shrink does, down to a floor.</p>"
        "<details><summary>The rank of every matrix</summary>"
        f'<div class="wide">{ranks.html()}</div></details></section>'
    )


_SAVED = {
    "factor": "parameters of the linear matrices",
    "adapter": "trained numbers, against tuning the matrices whole",
    "optimizer": "optimizer state, against AdamW's two moments",
}


def _card(purpose: Purpose, suggestion: Suggestion) -> str:
    savings = suggestion.plan.savings()
    ranks = [e.rank for e in suggestion.plan.values() if e.rank is not None]
    spread = f"{min(ranks)} to {max(ranks)}" if ranks else "none"
    return (
        f"<article><h3>{html.escape(suggestion.title)}</h3>"
        f'<p class="big">−{1 - savings.kept:.0%}</p><p>{savings.dense / 1e6:,.2f} M → '
        f"{savings.planned / 1e6:,.2f} M {_SAVED[purpose]}</p>"
        f"<p>{len(ranks)} of {len(suggestion.plan)} matrices, rank {spread}</p>"
        f'<p class="dim">{html.escape(suggestion.how)}</p></article>'
    )


def _rank(suggestion: Suggestion, name: str) -> str:
    rank = suggestion.plan[name].rank
    return "dense" if rank is None else str(rank)


def _tables(report: ModelReport) -> str:
    return (
        '<section><h2>All figures</h2><details><summary>Table</summary><div class="wide">'
        f"{report.xray.table().html()}</div></details></section>"
    )
