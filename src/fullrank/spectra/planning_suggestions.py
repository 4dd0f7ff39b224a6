"""Ranks to start from, for each of the three things that ranks are for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fullrank.core.plan import Purpose, RankPlan
from fullrank.core.rank_rules import Energy

if TYPE_CHECKING:
    from fullrank.spectra.xray import XRay

ADAPTER_RANK = 16
"""Mean rank of a suggested adapter: what LoRA is commonly given."""

OPTIMIZER_SHARE = 0.25
"""Mean rank of a suggested optimizer subspace, as a share of the shorter side (GaLore, table 2)."""


@dataclass(frozen=True)
class Suggestion:
    """A plan, what it is for in a reader's words, and how its ranks were found."""

    title: str
    plan: RankPlan
    how: str


def suggestions(xray: XRay) -> Mapping[Purpose, Suggestion]:
    """Suggest a plan for each purpose, from the spectra of the weights alone.

    Compression keeps 90 % of each matrix's energy where that saves anything. For adapters and
    optimizers the size is a budget that one chooses; the weights say how to divide it: in
    proportion to the rank that holds half of a matrix's energy.

    Raises
    ------
    InputError
        When the model has no dense linear matrix to plan for.

    Examples
    --------
    >>> import torch
    >>> from fullrank.spectra import xray
    >>> found = suggestions(xray(torch.nn.Sequential(torch.nn.Linear(64, 64))))
    >>> found["optimizer"].plan["0"].rank
    16
    """
    half = {purpose: xray.plan(purpose, Energy(0.5)) for purpose in ("adapter", "optimizer")}
    adapter = half["adapter"]
    optimizer = half["optimizer"]
    return {
        "factor": Suggestion(
            "Compression",
            xray.plan("factor", Energy(0.9)),
            "90 % of each matrix's energy; where that saves nothing the matrix stays dense",
        ),
        "adapter": Suggestion(
            "Adapter (LoRA)",
            adapter.scale(ADAPTER_RANK / _mean_rank(adapter)),
            f"mean rank {ADAPTER_RANK}, divided in proportion to the rank that holds half the "
            "energy",
        ),
        "optimizer": Suggestion(
            "Optimizer (GaLore)",
            optimizer.scale(_quarter(optimizer) / _mean_rank(optimizer)),
            f"on average {OPTIMIZER_SHARE:.0%} of the shorter side, divided likewise",
        ),
    }


def _mean_rank(plan: RankPlan) -> float:
    ranks = [entry.rank for entry in plan.values() if entry.rank is not None]
    # A matrix of zeros has no rank to divide by; then nothing is scaled.
    return sum(ranks) / len(ranks) if ranks else 1.0


def _quarter(plan: RankPlan) -> float:
    sides = [OPTIMIZER_SHARE * min(entry.shape) for entry in plan.values()]
    return max(1.0, sum(sides) / len(sides))
