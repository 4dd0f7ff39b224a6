"""`model_report`: everything that is worth looking at in a model, or in two of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.core.errors import InputError
from fullrank.core.files import atomic_write
from fullrank.core.progress import progress
from fullrank.core.table import Table
from fullrank.spectra.flaws import Flaws, find_flaws
from fullrank.spectra.matrices import Weight, patterns, weight_matrices
from fullrank.spectra.overlap import Overlap, subspace_overlap
from fullrank.spectra.spectrum import Spectrum
from fullrank.spectra.xray import Accuracy, XRay, xray

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ModelReport:
    """What :func:`model_report` found.

    Attributes
    ----------
    xray
        Spectra of the model's weights.
    flaws
        Name -> dead and duplicated directions; empty when they were not looked for.
    other
        Spectra of the second model, or None.
    overlaps
        Name -> what the leading subspaces of both models' matrices share.
    activations
        Name -> spectrum of the layer's inputs over a sample of texts; empty without data.
    other_flaws
        As ``flaws``, of the second model.
    """

    xray: XRay
    flaws: Mapping[str, Flaws] = field(default_factory=dict)
    other: XRay | None = None
    overlaps: Mapping[str, Overlap] = field(default_factory=dict)
    activations: Mapping[str, Spectrum] = field(default_factory=dict)
    other_flaws: Mapping[str, Flaws] = field(default_factory=dict)

    def to_html(self, path: str | Path | None = None) -> str | Path:
        """Make a self-contained page, which runs nothing and loads nothing.

        Parameters
        ----------
        path
            File to write, whole or not at all; None returns the page's text.
        """
        from fullrank.spectra.page import page

        text = page(self)
        return text if path is None else atomic_write(path, text.encode())

    def flaw_table(self) -> Table:
        """One row for every matrix of either model with dead or duplicated directions."""
        both = [(self.xray.model, self.flaws)]
        both += [(self.other.model, self.other_flaws)] if self.other is not None else []
        rows: list[list[Any]] = [
            [
                *([model] if self.other is not None else []),
                name,
                found.dead or None,
                found.rows.zeros or None,
                found.rows.count or None,
                found.columns.zeros or None,
                found.columns.count or None,
                _examples(found),
            ]
            for model, flaws in both
            for name, found in flaws.items()
            if found.any
        ]
        columns = ["model"] if self.other is not None else []
        columns += ["matrix", "dead directions", "zero rows", "repeated rows"]
        columns += ["zero columns", "repeated columns", "for example"]
        return Table(columns, rows, title="Dead and duplicated directions")

    def activation_table(self) -> Table:
        """One row for every layer that ran on the data: the effective rank of its inputs."""
        rows: list[list[Any]] = [
            [name, len(s), s.effective_rank, s.effective_rank / len(s), s.energy_rank(0.9)]
            for name, s in self.activations.items()
        ]
        columns = ["layer", "input width", "effective rank", "share", "r90"]
        formats = {"effective rank": ".1f", "share": ".1%"}
        return Table(columns, rows, title="Inputs of the layers", formats=formats)

    def overlap_table(self) -> Table:
        """One row for every matrix of both models: what its leading subspaces share."""
        rows: list[list[Any]] = [
            [
                name,
                found.rank,
                found.left_share,
                found.by_chance[0],
                found.right_share,
                found.by_chance[1],
                float(min(found.left[-1], found.right[-1])),
            ]
            for name, found in self.overlaps.items()
        ]
        columns = ["matrix", "r", "left", "left by chance", "right", "right by chance"]
        columns += ["smallest cosine"]
        formats = dict.fromkeys(columns[2:6], ".1%") | {"smallest cosine": ".3f"}
        return Table(columns, rows, title="Overlap of leading subspaces", formats=formats)


def model_report(
    model: nn.Module,
    against: nn.Module | None = None,
    *,
    name: str | None = None,
    against_name: str | None = None,
    rank: int | None = None,
    accuracy: Accuracy = "exact",
    include: Iterable[str] | str | None = None,
    activations: Mapping[str, Spectrum] | None = None,
    show_progress: bool = True,
) -> ModelReport:
    """Look into a model: spectra, dead and duplicated directions, and what changed against another.

    Parameters
    ----------
    model
        Any module, as for :func:`~fullrank.spectra.xray`.
    against
        A second one with the same layers: before tuning, or not shrunk. A layer of two factors is
        compared by its product.
    name, against_name
        Shown in titles.
    rank
        Dimensions of the subspaces compared. By default those that hold half the energy of the
        model's matrix, and never more than are stored in either.
    accuracy, include, show_progress
        As for :func:`~fullrank.spectra.xray`.
    activations
        Spectra to show beside those of the weights, by module name.

    Raises
    ------
    InputError
        When there is nothing to look at, or the two models share no matrices of one shape.

    Examples
    --------
    >>> import torch
    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <torch...
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> found = model_report(model, model)
    >>> round(found.overlaps["0"].left_share, 6)
    1.0
    """
    first = xray(model, accuracy=accuracy, include=include, name=name, show_progress=show_progress)
    weights = {w.name: w for w in weight_matrices(model) if w.name in first}
    flaws = _all_flaws(first, weights, show_progress)
    if against is None:
        return ModelReport(first, flaws, activations=activations or {})
    second = xray(
        against,
        accuracy=accuracy,
        include=_present(against, patterns(include)),
        name=against_name,
        show_progress=show_progress,
    )
    first.compare(second)  # says what does not fit, before the subspaces are taken
    others = {w.name: w for w in weight_matrices(against) if w.name in second}
    overlaps = _all_overlaps(first, weights, others, rank, show_progress)
    other_flaws = _all_flaws(second, others, show_progress)
    return ModelReport(first, flaws, second, overlaps, activations or {}, other_flaws)


def _present(model: nn.Module, include: list[str] | None) -> list[str] | None:
    """Leave out patterns that match nothing in the second model; it may lack some layers."""
    if include is None:
        return None
    from fnmatch import fnmatchcase

    names = [w.name for w in weight_matrices(model)]
    return [p for p in include if any(fnmatchcase(n, p) for n in names)] or include


def _all_flaws(found: XRay, weights: Mapping[str, Weight], show_progress: bool) -> dict[str, Flaws]:
    flaws = {}
    with progress("directions", len(weights), show_progress, "matrices") as advance:
        for name, weight in weights.items():
            matrix = found[name]
            flaws[name] = find_flaws(
                weight.fetch(), matrix.spectrum, dtype=weight.dtype, rank=weight.rank
            )
            advance(1)
    return flaws


def _all_overlaps(
    found: XRay,
    weights: Mapping[str, Weight],
    others: Mapping[str, Weight],
    rank: int | None,
    show_progress: bool,
) -> dict[str, Overlap]:
    both = [name for name in weights if name in others]
    overlaps = {}
    with progress("subspaces", len(both), show_progress, "matrices") as advance:
        for name in both:
            one, other = weights[name], others[name]
            wanted = rank or found[name].spectrum.energy_rank(0.5)
            stored = [w.rank for w in (one, other) if w.rank is not None]
            r = min(wanted, *stored, *one.shape)
            advance(1)
            if r >= 1:
                overlaps[name] = subspace_overlap(one.fetch(), other.fetch(), r)
    if not overlaps:
        raise InputError("every matrix that both models have is zero: no subspaces to compare")
    return overlaps


def _examples(found: Flaws) -> str:
    texts = [f"row {b} like {a}" for a, b in found.rows.examples[:1]]
    texts += [f"column {b} like {a}" for a, b in found.columns.examples[:1]]
    return ", ".join(texts)
