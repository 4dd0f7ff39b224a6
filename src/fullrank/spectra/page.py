"""The X-ray as a page: something to look at first, and to read where one wants to know more."""

from __future__ import annotations

import base64
import hashlib
import html
from typing import TYPE_CHECKING

from fullrank.spectra.curves import legend
from fullrank.spectra.matrices import place

if TYPE_CHECKING:
    from fullrank.spectra.matrix_spectrum import MatrixSpectrum
    from fullrank.spectra.xray import XRay

STYLE = """
:root{color-scheme:light dark;--ink:#1c2128;--dim:#5d6670;--page:#fff;--line:#dde2e7;
--soft:#f5f7f9}
@media(prefers-color-scheme:dark){:root{--ink:#e3e7eb;--dim:#98a2ad;--page:#15191e;
--line:#313840;--soft:#1d2228}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:72rem;padding:2rem 1.25rem 4rem;font:16px/1.55 system-ui,sans-serif;
color:var(--ink);background:var(--page)}
h1{font-size:1.9rem;line-height:1.2;margin:0 0 .5rem}
h2{margin:2.5rem 0 .5rem;font-size:1.3rem}
p{max-width:46rem}.dim,figcaption,caption,footer{color:var(--dim);font-size:.875rem}
dl{display:flex;flex-wrap:wrap;gap:.75rem 2.5rem;margin:1.5rem 0}
dt{color:var(--dim);font-size:.8rem}dd{margin:0;font-size:1.35rem;font-variant-numeric:tabular-nums}
figure{margin:1rem 0}.wide{overflow-x:auto}.fit svg{max-width:100%;height:auto}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1.1rem;padding:0;margin:.5rem 0;
font-size:.8rem;color:var(--dim)}
details{border-top:1px solid var(--line);padding:.5rem 0}
summary{cursor:pointer;font-weight:600}summary span{color:var(--dim);font-weight:400}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(17.5rem,1fr));gap:1rem;
margin:.75rem 0}
.plots figure{background:var(--soft);border-radius:.5rem;padding:.75rem;margin:0;min-width:0}
.plots svg{max-width:100%;height:auto;display:block}
.plots b{display:block;font-size:.85rem;overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:.875rem}caption{text-align:left;padding-bottom:.35rem}
th,td{padding:.3rem .75rem;text-align:left;border-bottom:1px solid var(--line);white-space:nowrap}
thead th{color:var(--dim)}.num{text-align:right;font-variant-numeric:tabular-nums}
"""


def page(xray: XRay) -> str:
    """Return the whole page.

    Its style is allowed by its hash and everything else is forbidden, so that whatever a model's
    names hold, nothing runs and nothing is loaded.
    """
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    title = f"X-ray of {html.escape(xray.model)}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        f"content=\"default-src 'none'; style-src 'sha256-{digest}'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{title}</title>'
        f"<style>{STYLE}</style></head><body><main><h1>{title}</h1>"
        f"{_lead(xray)}{sections(xray)}</main></body></html>"
    )


def sections(xray: XRay) -> str:
    """Heat map, energy curves, spectra and table, as HTML to stand inside a page."""
    return "".join([_heatmap(xray), _energy(xray), _spectra(xray), _table(xray)])


def _lead(xray: XRay) -> str:
    linear = [m for m in xray.values() if m.kind == "linear"] or list(xray.values())
    low, high = min(linear, key=lambda m: m.share), max(linear, key=lambda m: m.share)
    facts = {
        "weight matrices": str(len(xray)),
        "parameters in them": f"{xray.parameters / 1e6:,.1f} M",
        "mean effective rank": f"{xray.mean_share:.0%} of full",
        f"lowest: {low.name}": f"{low.share:.0%}",
        f"highest: {high.name}": f"{high.share:.0%}",
    }
    items = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{value}</dd></div>" for name, value in facts.items()
    )
    return (
        "<p>How much of its rank each weight matrix really uses. The effective rank is the "
        "exponential of the entropy of the singular values: the number of equally strong "
        f"directions that would be as spread out.</p><dl>{items}</dl>"
    )


def _heatmap(xray: XRay) -> str:
    return (
        "<section><h2>Effective rank, as a share of full rank</h2>"
        f'<figure class="wide">{xray.heatmap_svg()}<figcaption>Projections down, layers across. '
        "Dark: few directions carry the matrix. Point at a cell for its figures.</figcaption>"
        "</figure></section>"
    )


def _energy(xray: XRay) -> str:
    return (
        "<section><h2>Energy held by the leading directions</h2>"
        f'<figure class="fit">{xray.energy_svg()}{legend(xray.by_projection())}<figcaption>Share '
        "of the squared singular values (up) against share of the rank (across); dotted: 90, 95 "
        "and 99 %. A straight diagonal is a matrix that low rank does not fit.</figcaption>"
        "</figure></section>"
    )


def _spectra(xray: XRay) -> str:
    groups: dict[str, list[MatrixSpectrum]] = {}
    for matrix in xray.values():
        where = place(matrix.name)
        group = "outside layers" if where.layer is None else f"{where.stack} {where.layer}".strip()
        groups.setdefault(group, []).append(matrix)
    blocks = "".join(
        f"<details{' open' if len(groups) == 1 else ''}><summary>{html.escape(name)} "
        f"<span>{len(members)} {'matrix' if len(members) == 1 else 'matrices'}</span></summary>"
        f'<div class="plots">{"".join(_plot(xray, m) for m in members)}</div></details>'
        for name, members in groups.items()
    )
    return (
        '<section><h2>Spectra</h2><p class="dim">Singular values relative to the largest, both '
        f"axes logarithmic; the dashed line is the effective rank.</p>{blocks}</section>"
    )


def _plot(xray: XRay, matrix: MatrixSpectrum) -> str:
    found = matrix.measures()
    margin = matrix.margins.get("effective rank")
    spread = "" if margin is None else f" ± {margin:.0f}"
    factored = "" if matrix.rank is None else f", stored as rank {matrix.rank}"
    caption = (
        f"{matrix.shape[0]} × {matrix.shape[1]}{factored}: effective rank "
        f"{found['effective rank']:.0f}{spread} of {min(matrix.shape)}, stable rank "
        f"{found['stable rank']:.1f}; 90 % of the energy in {found['r90']:.0f}, 99 % in "
        f"{found['r99']:.0f}"
    )
    return (
        f"<figure><b>{html.escape(matrix.name)}</b>{xray.spectrum_svg(matrix.name)}"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _table(xray: XRay) -> str:
    return (
        '<section><h2>All figures</h2><details><summary>Table</summary><div class="wide">'
        f"{xray.table().html()}</div></details></section>"
    )
