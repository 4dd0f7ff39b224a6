"""What happened in a training run: loss curve, development metric, RankMe, speed."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from fullrank.core.table import Table


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step; ``seconds`` and ``tokens`` count from the start of the run."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    seconds: float
    tokens: int


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One evaluation: the development metric, RankMe of embeddings (None without), its cost."""

    step: int
    metric: float
    rankme: float | None
    seconds: float
    took: float


@dataclass
class TrainingHistory:
    """Every step and every evaluation of a run, and how it ended.

    Attributes
    ----------
    metric
        Name of the development metric.
    steps, evaluations
        In order.
    stopped
        Why it ended: ``"time"``, ``"steps"``, ``"patience"``, or ``""`` while it runs.
    lower_is_better
        Whether the metric is a loss.
    select
        What the best evaluation is chosen by: ``"metric"``, or ``"rankme"``.

    Examples
    --------
    >>> history = TrainingHistory("nDCG@10")
    >>> history.evaluations.append(EvaluationRecord(0, 0.40, 200.0, 0.0, 1.0))
    >>> history.evaluations.append(EvaluationRecord(50, 0.45, 190.0, 60.0, 1.0))
    >>> history.best.step, round(history.gain, 2)
    (50, 0.05)
    """

    metric: str
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    stopped: str = ""
    lower_is_better: bool = False
    select: str = "metric"

    @property
    def best(self) -> EvaluationRecord | None:
        """The first of the best evaluations; None before there is one."""
        if self.select == "rankme":
            return max(self.evaluations, key=lambda e: e.rankme or 0.0, default=None)
        sign = -1 if self.lower_is_better else 1
        return max(self.evaluations, key=lambda e: sign * e.metric, default=None)

    @property
    def gain(self) -> float:
        """By how much the metric of the best evaluation is better than that before training."""
        best = self.best
        if best is None:
            return 0.0
        gain = best.metric - self.evaluations[0].metric
        return -gain if self.lower_is_better else gain

    @property
    def since_best(self) -> int:
        """Evaluations since the best one."""
        best = self.best
        return 0 if best is None else sum(e.step > best.step for e in self.evaluations)

    @property
    def tokens_per_second(self) -> float:
        """Tokens trained on a second, evaluations not counted."""
        if not self.steps:
            return 0.0
        last = self.steps[-1]
        evaluating = sum(e.took for e in self.evaluations if e.step < last.step)
        return last.tokens / max(last.seconds - evaluating, 1e-9)

    def table(self) -> Table:
        """Return the evaluations as a table, with the mean loss since the one before."""
        rows = []
        before = 0
        for e in self.evaluations:
            losses = [s.loss for s in self.steps if before < s.step <= e.step]
            mean = sum(losses) / len(losses) if losses else None
            row = [e.step, e.seconds, mean, e.metric]
            rows.append(row if e.rankme is None else [*row, e.rankme])
            before = e.step
        columns = ["step", "seconds", "loss", f"dev {self.metric}", "RankMe"]
        return Table(
            columns[: len(rows[0])] if rows else columns,
            rows,
            title="Training",
            formats={"seconds": ".0f", "loss": ".3f", f"dev {self.metric}": ".4f", "RankMe": ".1f"},
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainingHistory:
        """Build a history from what :meth:`to_json` gave."""
        return cls(
            metric=values["metric"],
            steps=[StepRecord(**s) for s in values["steps"]],
            evaluations=[EvaluationRecord(**e) for e in values["evaluations"]],
            stopped=values["stopped"],
            lower_is_better=values.get("lower_is_better", False),
            select=values.get("select", "metric"),
        )
