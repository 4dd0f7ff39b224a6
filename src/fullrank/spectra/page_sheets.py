"""The sheet of one matrix: what the page shows when its cell is chosen."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from fullrank.spectra.curves import angles_svg, legend, spectrum_svg
from fullrank.spectra.page_style import facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fullrank.core.plan import Purpose
    from fullrank.spectra.matrix_spectrum import MatrixSpectrum
    from fullrank.spectra.planning_suggestions import Suggestion
    from fullrank.spectra.report import ModelReport


def sheet(report: ModelReport, name: str, place: str, plans: Mapping[Purpose, Suggestion]) -> str:
    """Return a matrix's spectrum and figures, under the address ``place``."""
    matrix = report.xray[name]
    m, n = matrix.shape
    factored = "" if matrix.rank is None else f", stored as rank {matrix.rank}"
    body = (
        f'<h3>{html.escape(name)}</h3><p class="dim">{m} × {n}, {matrix.kind}{factored}</p>'
        f"{_plot(report, matrix)}{facts(_figures(matrix))}"
        f"{_activations(report, matrix)}{_overlap(report, name)}{_notes(report, name, plans)}"
    )
    return f'<span class="spot" id="{place}"></span><article class="sheet">{body}</article>'


def _plot(report: ModelReport, matrix: MatrixSpectrum) -> str:
    lines = {report.xray.model: matrix.spectrum}
    if report.other is not None and matrix.name in report.other:
        label = report.other.model
        if label in lines:
            label += " (second)"
        lines[label] = report.other[matrix.name].spectrum
    names = legend(lines) if len(lines) > 1 else ""
    return (
        f"{spectrum_svg(lines, mark=matrix.spectrum.effective_rank)}{names}"
        '<p class="dim">Singular values relative to the largest, both axes logarithmic; dashed: '
        "effective rank.</p>"
    )


def _figures(matrix: MatrixSpectrum) -> dict[str, str]:
    found = matrix.measures()
    margin = matrix.margins.get("effective rank")
    spread = "" if margin is None else f" ± {margin:.0f}"
    return {
        f"effective rank of {min(matrix.shape)}": f"{found['effective rank']:.0f}{spread}",
        "share": f"{matrix.share:.0%}",
        "stable rank": f"{found['stable rank']:.1f}",
        "90 % of energy in": f"{found['r90']:.0f}",
        "95 % in": f"{found['r95']:.0f}",
        "99 % in": f"{found['r99']:.0f}",
    }


def _activations(report: ModelReport, matrix: MatrixSpectrum) -> str:
    spectrum = report.activations.get(matrix.name)
    if spectrum is None:
        return ""
    share = spectrum.effective_rank / len(spectrum)
    return (
        f"<h3>Its inputs</h3>{spectrum_svg({matrix.name: spectrum}, mark=spectrum.effective_rank)}"
        f'<p class="dim">What flows in over the texts given: effective rank '
        f"{spectrum.effective_rank:.0f} of {len(spectrum)} ({share:.0%}), 90 % of the energy in "
        f"{spectrum.energy_rank(0.9)} directions.</p>"
    )


def _overlap(report: ModelReport, name: str) -> str:
    found = report.overlaps.get(name)
    if found is None:
        return ""
    sides = {"left (outputs)": found.left, "right (inputs)": found.right}
    return (
        f"<h3>Overlap of the leading {found.rank} directions</h3>{angles_svg(sides)}{legend(sides)}"
        f'<p class="dim">Cosines of the principal angles. Shared: {found.left_share:.0%} on the '
        f"left, {found.right_share:.0%} on the right; random subspaces would share "
        f"{found.by_chance[0]:.0%} and {found.by_chance[1]:.0%}.</p>"
    )


def _notes(report: ModelReport, name: str, plans: Mapping[Purpose, Suggestion]) -> str:
    lines = []
    flaws = report.flaws.get(name)
    if flaws is not None and flaws.dead:
        lines.append(f"{flaws.dead} dead directions.")
    if flaws is not None:
        for what, side in (("rows", flaws.rows), ("columns", flaws.columns)):
            if side.zeros:
                lines.append(f"{side.zeros} {what} of zeros.")
            if side.count:
                lines.append(f"{side.count} {what} repeat an earlier one.")
    ranks = [
        f"{s.title} {'dense' if s.plan[name].rank is None else s.plan[name].rank}"
        for s in plans.values()
        if name in s.plan
    ]
    if ranks:
        lines.append(f"Ranks to start from: {', '.join(ranks)}.")
    return "".join(f"<p>{html.escape(line)}</p>" for line in lines)
