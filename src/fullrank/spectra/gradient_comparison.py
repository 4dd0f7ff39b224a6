"""Two data sets side by side: what their examples would change, with standard errors."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fullrank.core.errors import InputError
from fullrank.core.files import atomic_write
from fullrank.core.table import Cell, Table
from fullrank.spectra.curves import legend, violin_svg
from fullrank.spectra.page_style import envelope, facts

if TYPE_CHECKING:
    from fullrank.spectra.gradient_quality import Scores

MEASURES = {"nuclear": "nuclear norm", "erank": "effective rank"}

_STYLE = """
.violins{display:grid;grid-template-columns:repeat(auto-fill,minmax(17.5rem,1fr));gap:1rem;
margin-top:1rem}
.violins figure{background:var(--soft);border-radius:.6rem;padding:.8rem;margin:0;min-width:0;
overflow-wrap:anywhere}
.violins svg{width:100%;height:auto;display:block}
"""


@dataclass(frozen=True)
class Difference:
    """A mean of each set, and their difference.

    Attributes
    ----------
    a, b
        Means.
    error
        Standard error of ``a - b``.
    """

    a: float
    b: float
    error: float

    @property
    def z(self) -> float:
        """``a - b`` in standard errors."""
        return (self.a - self.b) / self.error if self.error else float("nan")

    @classmethod
    def of(cls, a: Sequence[float], b: Sequence[float]) -> Difference:
        """Compare two independent samples.

        >>> found = Difference.of([1.0, 3.0], [0.0, 0.0])
        >>> found.a, found.b, found.error
        (2.0, 0.0, 1.0)
        """
        error = np.sqrt(sum(np.var(v, ddof=1) / len(v) for v in (a, b)))
        return cls(float(np.mean(a)), float(np.mean(b)), float(error))


@dataclass(frozen=True)
class Comparison:
    """What :meth:`~fullrank.spectra.GradientQuality.compare` found.

    Attributes
    ----------
    names
        Of the two data sets.
    scores
        Of their examples.
    length
        Tokens of each response that were scored; None for all.

    Raises
    ------
    InputError
        When fewer than two examples of a set could be scored.
    """

    names: tuple[str, str]
    scores: tuple[Scores, Scores]
    length: int | None

    def __post_init__(self) -> None:
        for scores, name in zip(self.scores, self.names, strict=True):
            if len(scores.rows) < 2:
                reasons = ", ".join(sorted(set(scores.skipped.values())))
                raise InputError(
                    f"{name} has {len(scores.rows)} examples to compare ({reasons}); give more "
                    "of them, or score another number of tokens"
                )

    @property
    def layers(self) -> list[str]:
        """Names of the layers that were measured."""
        return list(self.scores[0].rows[0].erank)

    def difference(self, what: str, layers: Sequence[str] | None = None) -> Difference:
        """Compare a measure: mean over layers of each example, then over examples.

        Parameters
        ----------
        what
            ``"nuclear"`` or ``"erank"``.
        layers
            Some of :attr:`layers`; all by default.
        """
        return Difference.of(*(self._values(side, what, layers) for side in range(2)))

    def _values(self, side: int, what: str, layers: Sequence[str] | None = None) -> list[float]:
        chosen = self.layers if layers is None else layers
        return [
            float(np.mean([getattr(row, what)[layer] for layer in chosen]))
            for row in self.scores[side].rows
        ]

    def projections(self) -> Mapping[str, list[str]]:
        """Layers by projection: the last part of their names."""
        found: dict[str, list[str]] = {}
        for layer in self.layers:
            found.setdefault(layer.rpartition(".")[2], []).append(layer)
        return found

    def table(self, what: str = "erank") -> Table:
        """One row a projection, its layers averaged, and one for all of them.

        Parameters
        ----------
        what
            ``"nuclear"`` or ``"erank"``. ``z`` is the difference in standard errors.
        """
        groups = {**self.projections(), "all": self.layers}
        rows: list[list[Cell]] = []
        for name, layers in groups.items():
            found = self.difference(what, layers)
            gap = f"{found.a - found.b:+.3g} ± {found.error:.2g}"
            rows.append([name, found.a, found.b, gap, found.z])
        columns = [MEASURES[what], *self.names, "difference", "z"]
        return Table(columns, rows, title=self._title(), formats={"z": ".1f"})

    def _title(self) -> str:
        counts = " and ".join(
            f"{len(scores.rows)} of {name}"
            for scores, name in zip(self.scores, self.names, strict=True)
        )
        if self.length is None:
            return f"{counts}, whole responses: their lengths alone move both measures"
        return f"{counts}, the first {self.length} tokens of each response"

    def layer_table(self) -> Table:
        """One row a layer."""
        a, b = self.names
        rows: list[list[Cell]] = []
        for layer in self.layers:
            nuclear, rank = (self.difference(what, [layer]) for what in MEASURES)
            rows.append([layer, nuclear.a, nuclear.b, nuclear.z, rank.a, rank.b, rank.z])
        columns = ["layer", f"nuclear, {a}", f"nuclear, {b}", "z"]
        columns += [f"rank, {a}", f"rank, {b}", "z of rank"]
        formats = {"z": ".1f", "z of rank": ".1f", columns[4]: ".2f", columns[5]: ".2f"}
        return Table(columns, rows, title="Layer by layer", formats=formats)

    def to_html(self, path: str | Path) -> Path:
        """Write a self-contained page with violin plots per layer and projection."""
        a, b = self.names
        values = {
            "examples": f"{len(self.scores[0].rows)} / {len(self.scores[1].rows)}",
            "left out": f"{len(self.scores[0].skipped)} / {len(self.scores[1].skipped)}",
            "tokens of a response": "all" if self.length is None else str(self.length),
        }
        for what, title in MEASURES.items():
            found = self.difference(what)
            values[title] = f"{found.a:.3g} / {found.b:.3g}"
            values[f"{title}, difference"] = f"{found.z:+.1f} s.e."
        body = facts(values) + _NOTE
        for what, title in MEASURES.items():
            body += f"<section><h2>{title.capitalize()}</h2>{legend(self.names)}"
            body += f'<div class="wide">{self.table(what).html()}</div>'
            body += f'<div class="violins">{self._violins(what)}</div></section>'
        body += f'<section><div class="wide">{self.layer_table().html()}</div></section>'
        body += self._skipped()
        return atomic_write(path, envelope(f"{a} against {b}", body, _STYLE).encode())

    def _violins(self, what: str) -> str:
        figures = []
        for layer in self.layers:
            sides = {n: self._values(i, what, [layer]) for i, n in enumerate(self.names)}
            plot = violin_svg(sides, f"{MEASURES[what]} of {layer}")
            figures.append(f"<figure>{plot}<figcaption>{html.escape(layer)}</figcaption></figure>")
        return "".join(figures)

    def _skipped(self) -> str:
        rows: list[list[Cell]] = [
            [name, id_, reason]
            for scores, name in zip(self.scores, self.names, strict=True)
            for id_, reason in scores.skipped.items()
        ]
        if not rows:
            return ""
        table = Table(["set", "id", "why"], rows).html()
        return f"<details><summary>Left out: {len(rows)}</summary>{table}</details>"


_NOTE = (
    "<p>A smaller nuclear norm means that an example pushes the weights less hard, a larger "
    "effective rank that it pushes them in more directions; data of higher quality tends to both. "
    "Longer responses do so whatever their quality, so that only equal lengths tell.</p>"
)
