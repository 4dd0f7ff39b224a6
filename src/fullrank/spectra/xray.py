"""`xray`: the spectrum and the effective ranks of every weight matrix in a model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

from fullrank.core.errors import InputError
from fullrank.core.plan import Purpose, RankPlan
from fullrank.core.rank_rules import ModelRule, RankRule
from fullrank.core.table import Table
from fullrank.spectra.matrices import patterns
from fullrank.spectra.matrix_spectrum import ENERGIES, MatrixSpectrum
from fullrank.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import nn

Accuracy = Literal["exact", "sampled"]

FORMAT = 1


class XRay(Mapping[str, MatrixSpectrum]):
    """The spectra of a model's weight matrices: canonical name -> :class:`MatrixSpectrum`.

    Made by :func:`xray`; spectra are computed once and looked at, compared and planned with
    without the model.

    Parameters
    ----------
    matrices
        What was found, in the model's order.
    fingerprint
        :func:`~fullrank.core.model_fingerprint` of the model.
    model
        Name shown in titles.
    """

    def __init__(
        self, matrices: Iterable[MatrixSpectrum], *, fingerprint: str = "", model: str = "model"
    ) -> None:
        self._matrices = {matrix.name: matrix for matrix in matrices}
        self.fingerprint = fingerprint
        self.model = model
        if not self._matrices:
            raise InputError("an X-ray of no matrices")

    def __getitem__(self, name: str) -> MatrixSpectrum:
        return self._matrices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._matrices)

    def __len__(self) -> int:
        return len(self._matrices)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, XRay):
            return NotImplemented
        return self._as_dict() == other._as_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"XRay({self.model!r}, {len(self)} matrices, mean share {self.mean_share:.1%})"

    @property
    def parameters(self) -> int:
        """Numbers in all matrices."""
        return sum(matrix.parameters for matrix in self.values())

    @property
    def mean_share(self) -> float:
        """Mean over linear matrices of effective rank / min(shape); over all if none is linear."""
        shares = [m.share for m in self.values() if m.kind == "linear"]
        shares = shares or [m.share for m in self.values()]
        return math.fsum(shares) / len(shares)

    # -- looking at it ---------------------------------------------------------------------

    def table(self) -> Table:
        """One row a matrix: shape, effective rank and its share, stable rank, energy ranks.

        With sampled spectra, a column says how far the effective rank may be off (95 %).
        """
        sampled = any(m.margins for m in self.values())
        names = [name for name in _FORMATS if name not in ("nuclear norm", "±")]
        rows = []
        for name, matrix in self.items():
            found = {**matrix.measures(), "share": matrix.share}
            row: list[Any] = [name, _shape(matrix.shape), *(found[n] for n in names)]
            if sampled:
                row.insert(3, matrix.margins.get("effective rank"))
            rows.append(row)
        columns = ["matrix", "shape", *names]
        if sampled:
            columns.insert(3, "±")
        return Table(columns, rows, title=f"X-ray of {self.model}", formats=_FORMATS)

    def compare(self, other: XRay) -> Table:
        """Show this model beside another of the same architecture, e.g. before and after tuning.

        ``moved`` is the distance between the two spectra relative to this one,
        ``|sigma' - sigma| / |sigma|``: the weights moved at least that far.

        Raises
        ------
        InputError
            When no matrix is in both, or one has another shape there.
        """
        both = [name for name in self if name in other]
        if not both:
            raise InputError(
                f"{self.model} and {other.model} share no matrix names, e.g. {next(iter(self))!r} "
                f"and {next(iter(other))!r}: they are of different architectures"
            )
        rows = []
        for name in both:
            one, two = self[name], other[name]
            if one.shape != two.shape:
                raise InputError(f"{name} is {one.shape} in one model and {two.shape} in the other")
            before, after = one.measures(), two.measures()
            row: list[Any] = [name, _shape(one.shape)]
            for measure in ("effective rank", "stable rank", "r90"):
                row += [before[measure], after[measure]]
            rows.append([*row, _moved(one.spectrum, two.spectrum)])
        columns = ["matrix", "shape"]
        for measure in ("effective rank", "stable rank", "r90"):
            columns += [measure, f"{measure} after"]
        formats = {
            **_FORMATS,
            **{f"{name} after": spec for name, spec in _FORMATS.items()},
            "moved": ".2%",
        }
        title = f"{self.model} and {other.model}"
        return Table([*columns, "moved"], rows, title=title, formats=formats)

    def heatmap_svg(
        self,
        link: Callable[[str], str] | None = None,
        span: tuple[float, float] | None = None,
    ) -> str:
        """Return a heat map of effective rank shares, projections by layers, as ``<svg>``.

        Parameters
        ----------
        link
            From a matrix's name to where its cell leads, such as ``"#m3"``.
        span
            Shares at the two ends of the colours; those found by default.
        """
        from fullrank.spectra.heatmap import heatmap_svg

        def describe(name: str) -> str:
            m = self[name]
            return (
                f"{name}, {_shape(m.shape)}: effective rank {m.spectrum.effective_rank:.1f} "
                f"({m.share:.1%}), stable rank {m.spectrum.stable_rank:.1f}"
            )

        return heatmap_svg(
            {name: m.share for name, m in self.items()},
            title=f"Effective rank of the weight matrices of {self.model}, share of the largest",
            describe=describe,
            link=link,
            span=span,
        )

    def spectrum_svg(self, name: str) -> str:
        """Return one matrix's singular values on logarithmic axes, as ``<svg>``."""
        from fullrank.spectra.curves import spectrum_svg

        spectrum = self[name].spectrum
        return spectrum_svg({name: spectrum}, mark=spectrum.effective_rank)

    def energy_svg(self) -> str:
        """Return the energy curves of all matrices, coloured by projection, as ``<svg>``."""
        from fullrank.spectra.curves import energy_svg

        return energy_svg(self.by_projection())

    def by_projection(self) -> dict[str, list[Spectrum]]:
        """Projection (the same place in every layer) -> spectra, layer by layer."""
        from fullrank.spectra.matrices import grid

        rows, rest = grid(self)
        groups = {
            label: [self[n].spectrum for n in cells.values()] for label, cells in rows.items()
        }
        return groups | {name: [self[name].spectrum] for name in rest}

    @overload
    def to_html(self, path: None = None) -> str: ...

    @overload
    def to_html(self, path: str | Path) -> Path: ...

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """Make a self-contained page: heat map, every spectrum, energy curves, plans, the table.

        It loads nothing, runs no script, and carries a content security policy that says so.
        :func:`~fullrank.spectra.model_report` makes one that says more.

        Parameters
        ----------
        path
            File to write, whole or not at all; None returns the page's text.

        Returns
        -------
        str or Path
            The text, or the path written.
        """
        from fullrank.spectra.report import ModelReport

        return ModelReport(self).to_html(path)

    # -- planning with it ------------------------------------------------------------------

    def plan(
        self,
        purpose: Purpose = "factor",
        rule: RankRule | ModelRule | None = None,
        *,
        include: Iterable[str] | str | None = None,
        exclude: Iterable[str] | str = (),
    ) -> RankPlan:
        """Turn spectra into ranks.

        Parameters
        ----------
        purpose
            ``"factor"``, ``"optimizer"`` or ``"adapter"``. For factors, a matrix whose rank
            would not save parameters stays dense, and its entry says so.
        rule
            See :mod:`fullrank.core.rank_rules`; ``Energy(0.9)`` by default.
        include, exclude
            Shell patterns over names, e.g. ``"*.attention.*"``. By default every linear matrix;
            embeddings, output heads and what is factored already are left out.

        Returns
        -------
        RankPlan
            With this X-ray's fingerprint: it applies to models of the same architecture.

        Raises
        ------
        InputError
            When a pattern matches nothing or a rule gives a rank out of range.
        """
        from fullrank.spectra.planning import ranks_for

        entries = ranks_for(self.values(), purpose, rule, patterns(include), patterns(exclude))
        return RankPlan(entries, purpose=purpose, fingerprint=self.fingerprint)

    # -- JSON ------------------------------------------------------------------------------

    def _as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "matrices": [
                {
                    "name": m.name,
                    "kind": m.kind,
                    "shape": list(m.shape),
                    "rank": m.rank,
                    "margins": dict(m.margins),
                    "measures": m.measures(),
                    "singular_values": m.spectrum.values.tolist(),
                }
                for m in self.values()
            ],
        }

    def to_json(self) -> str:
        """Return everything as a JSON text that :meth:`from_json` reads back."""
        return json.dumps(self._as_dict())

    @classmethod
    def from_json(cls, text: str) -> XRay:
        """Read an X-ray back.

        Raises
        ------
        InputError
            On anything that is not one, or one of a newer format.
        """
        try:
            data = json.loads(text)
            if data["format"] > FORMAT:
                raise InputError(
                    f"this X-ray has format {data['format']}; this version reads up to {FORMAT}: "
                    "upgrade fullrank"
                )
            matrices = [
                MatrixSpectrum(
                    name=str(m["name"]),
                    kind=m["kind"],
                    shape=(int(m["shape"][0]), int(m["shape"][1])),
                    spectrum=Spectrum([float(v) for v in m["singular_values"]]),
                    rank=m["rank"],
                    margins={str(k): float(v) for k, v in m["margins"].items()},
                )
                for m in data["matrices"]
            ]
            return cls(matrices, fingerprint=str(data["fingerprint"]), model=str(data["model"]))
        except (KeyError, TypeError, AttributeError, IndexError, json.JSONDecodeError) as error:
            raise InputError(f"this is not an X-ray: {error}") from error


def xray(
    model: nn.Module,
    *,
    accuracy: Accuracy = "exact",
    include: Iterable[str] | str | None = None,
    name: str | None = None,
    show_progress: bool = True,
    seed: int = 0,
) -> XRay:
    """Compute the spectrum of every weight matrix of a model.

    Linear layers, embeddings and layers of two factors; a weight that modules share is looked at
    once. The model is not changed. Singular values come from the smaller Gram matrix in float64,
    several matrices side by side (see :func:`~fullrank.linalg.gram_spectrum`).

    Parameters
    ----------
    model
        Any module; SentenceTransformer, PEFT, DDP and compile wrappers are seen through.
    accuracy
        ``"exact"``, or ``"sampled"``: large matrices by
        :func:`~fullrank.linalg.sampled_spectrum`, with a 95 % interval for every measure.
    include
        Shell patterns over canonical names; every matrix by default.
    name
        Shown in titles; by default what the model's configuration calls itself, else its class.
    show_progress
        Show a bar where standard error is a terminal.
    seed
        Of the random probes of ``"sampled"``.

    Returns
    -------
    XRay
        In the model's order.

    Raises
    ------
    InputError
        When there is no matrix, a pattern matches none, or weights are not finite.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(8, 4)
    >>> _ = torch.nn.init.orthogonal_(layer.weight)
    >>> found = xray(torch.nn.Sequential(layer))
    >>> round(found["0"].spectrum.effective_rank, 3)
    4.0
    """
    from fullrank.core.names import model_fingerprint
    from fullrank.spectra.measuring import measure_all

    if accuracy not in get_args(Accuracy):
        raise InputError(f"accuracy={accuracy!r}; it is 'exact' or 'sampled'")
    matrices = measure_all(model, patterns(include), accuracy == "sampled", show_progress, seed)
    return XRay(matrices, fingerprint=model_fingerprint(model), model=name or _called(model))


def _called(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    path = str(getattr(config, "_name_or_path", "") or "")
    # Of a folder the last part says enough, and says nothing about whose machine it was.
    name = Path(path).name
    return name if name not in ("", "model") else type(model).__name__


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} × {shape[1]}"


def _moved(before: Spectrum, after: Spectrum) -> float:
    gap = before.values - after.values
    scale = before.frobenius_norm or 1.0
    return float(math.sqrt(float((gap / scale) @ (gap / scale))))


_FORMATS: Mapping[str, str] = {
    "effective rank": ".1f",
    "±": ".1f",
    "share": ".1%",
    "stable rank": ".2f",
    "nuclear norm": ".4g",
    **{f"r{tau * 100:g}": "d" for tau in ENERGIES},
}
