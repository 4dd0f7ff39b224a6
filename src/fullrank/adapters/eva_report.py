"""What EVA found: ranks, explained variance, a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fullrank.core.plan import PlanEntry, RankPlan
from fullrank.core.table import Cell, Table


@dataclass(frozen=True)
class EvaReport:
    """What EVA found.

    Attributes
    ----------
    ranks
        Layer -> rank; 0 where the adapter was taken away.
    explained
        Layer -> share of the variance of its inputs that its rank explains.
    ratios
        Layer -> share that each component explains, as many as were looked at.
    shapes
        Layer -> ``(out, in)``.
    batches
        Forward passes.
    unconverged
        Layers whose components still moved when the data or ``max_batches`` ended
        (``method="ipca"``).
    seconds
        Layer -> time for its statistics and components; layers with the same input share one.
    plan
        The ranks as a plan of purpose ``"adapter"``.
    """

    ranks: Mapping[str, int]
    explained: Mapping[str, float]
    ratios: Mapping[str, Sequence[float]]
    shapes: Mapping[str, tuple[int, int]]
    batches: int
    unconverged: tuple[str, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = field(default="", repr=False)

    @property
    def plan(self) -> RankPlan:
        """The ranks as a plan; layers without an adapter are left alone."""
        entries = {
            name: PlanEntry(
                self.shapes[name],
                rank or None,
                method="eva",
                reason=f"explains {self.explained[name]:.1%} of the input variance",
            )
            for name, rank in self.ranks.items()
        }
        return RankPlan(
            entries, purpose="adapter", source="activation", fingerprint=self.fingerprint
        )

    def table(self) -> Table:
        """Return a row a layer."""
        rows: list[list[Cell]] = [
            [name, rank, self.explained[name], rank * sum(self.shapes[name])]
            for name, rank in self.ranks.items()
        ]
        return Table(
            ["layer", "rank", "explained variance", "parameters"],
            rows,
            title=f"EVA, {self.batches} batches",
            formats={"explained variance": ".1%", "parameters": ",d"},
        )
