"""From the spectra of an X-ray to ranks."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import get_args

from fullrank.core.errors import InputError
from fullrank.core.plan import PlanEntry, Purpose, break_even
from fullrank.core.rank_rules import Energy, LayerSpectrum, ModelRule, RankRule, apply_rule
from fullrank.spectra.matrix_spectrum import MatrixSpectrum


def ranks_for(
    matrices: Iterable[MatrixSpectrum],
    purpose: Purpose,
    rule: RankRule | ModelRule | None,
    include: list[str] | None,
    exclude: list[str] | None,
) -> dict[str, PlanEntry]:
    """Entries of a plan; see :meth:`XRay.plan <fullrank.spectra.XRay.plan>`."""
    if purpose not in get_args(Purpose):
        raise InputError(f"purpose {purpose!r}; it is one of {', '.join(get_args(Purpose))}")
    rule = Energy(0.9) if rule is None else rule
    chosen = _selected(matrices, include, exclude or [])
    ranks = apply_rule(rule, {m.name: LayerSpectrum(m.spectrum.values, m.shape) for m in chosen})
    return {m.name: _entry(m, ranks[m.name], purpose, rule) for m in chosen}


def _selected(
    matrices: Iterable[MatrixSpectrum], include: list[str] | None, exclude: list[str]
) -> list[MatrixSpectrum]:
    linear = [m for m in matrices if m.kind == "linear" and m.rank is None]
    for pattern in [*(include or []), *exclude]:
        if not any(fnmatchcase(m.name, pattern) for m in linear):
            raise InputError(f"no linear matrix is named like {pattern!r}; see table()")

    def wanted(name: str) -> bool:
        inside = include is None or any(fnmatchcase(name, p) for p in include)
        return inside and not any(fnmatchcase(name, p) for p in exclude)

    chosen = [m for m in linear if wanted(m.name)]
    if not chosen:
        raise InputError("no linear matrix is left to plan for")
    return chosen


def _entry(matrix: MatrixSpectrum, rank: int | None, purpose: Purpose, rule: object) -> PlanEntry:
    reason = f"{rule!r}; effective rank {matrix.spectrum.effective_rank:.0f}"
    if rank is None:
        return PlanEntry(matrix.shape, None, reason=f"{reason}: left alone")
    most = break_even(*matrix.shape)
    if purpose == "factor" and rank > most:
        why = f"{reason}: rank {rank} saves nothing (break-even is {most})"
        return PlanEntry(matrix.shape, None, reason=why)
    return PlanEntry(matrix.shape, rank, reason=reason)
