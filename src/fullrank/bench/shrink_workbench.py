"""What the methods of a comparison share: the subject, its statistics, the budget, the clock."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from fullrank.bench.shrink_subject import Subject
from fullrank.bench.shrink_training import Loss, Prepare, train
from fullrank.compress.calibration import CalibrationStats
from fullrank.compress.factorization import factorize
from fullrank.compress.family import Allocation, PlanFamily
from fullrank.compress.solvers import Method
from fullrank.compress.targets import factorisable
from fullrank.core.plan import RankPlan

T = TypeVar("T")


class Workbench:
    """A subject, and what several runs need to know of it: found once in a process.

    Parameters
    ----------
    subject
        What is shrunk.
    steps
        Of fine-tuning.

    Attributes
    ----------
    used
        Seconds that each thing took which has been asked for, whenever it was made.
    """

    def __init__(self, subject: Subject, steps: int) -> None:
        self.subject, self.steps = subject, steps
        self.used: dict[object, float] = {}
        self._made: dict[object, tuple[Any, float]] = {}

    @property
    def layers(self) -> tuple[str, ...]:
        """Canonical names of the layers that may be shrunk."""
        return self.subject.layers

    def copy(self) -> nn.Module:
        """Return a copy of the original."""
        return copy.deepcopy(self.subject.original)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """Make something at the first time it is asked for."""
        if key not in self._made:
            began = time.process_time()
            made = make()
            self._made[key] = made, time.process_time() - began
        found: T
        found, self.used[key] = self._made[key]
        return found

    def timed(self, make: Callable[[], T]) -> tuple[T, float]:
        """Make something; return it and its seconds, as if nothing had been made before."""
        before = set(self._made)
        self.used = {}
        began = time.process_time()
        made = make()
        taken = time.process_time() - began
        return made, taken + sum(s for key, s in self.used.items() if key in before)

    @property
    def stats(self) -> CalibrationStats:
        """What the layers see, and how the output reacts to them."""

        def observe() -> CalibrationStats:
            layers = factorisable(self.subject.original, self.layers)
            stats = CalibrationStats(layers, gradients=True)
            return stats.observe(self.subject.original, self.subject.calibration, progress=False)

        return self.once("stats", observe)

    def family(self, method: Method, allocation: Allocation) -> PlanFamily:
        """Decompose all layers by a method."""
        stats, subject = self.stats, self.subject

        def make() -> PlanFamily:
            return PlanFamily(
                subject.original,
                stats,
                method=method,
                allocation=allocation,
                grid=subject.grid,
                include=self.layers,
            )

        return self.once((method, allocation), make)

    def factorised(self, plan: RankPlan) -> nn.Module:
        """Return a copy of the model, its layers factorised by a plan that needs no data."""
        return factorize(self.copy(), plan, balance="sqrt", progress=False)

    def train(
        self,
        model: nn.Module,
        loss: Loss | None = None,
        prepare: Prepare = lambda _: None,
    ) -> nn.Module:
        """Fine-tune for the steps that all have; see :func:`train`."""
        return train(self.subject, model, self.steps, seed=0, loss=loss, prepare=prepare)
