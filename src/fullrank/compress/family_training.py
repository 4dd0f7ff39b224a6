"""Families of plans of the methods that shrink by training: one training, every size after it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullrank.compress.distill import Distillation
from fullrank.compress.distill_checkpoint import RecoveryCheckpoint
from fullrank.compress.factorization import factorize
from fullrank.compress.family import check_keep, kept_at_most
from fullrank.compress.maestro import Maestro
from fullrank.compress.measured_speed import faster_only
from fullrank.compress.planning import layer_spectra, make_plan
from fullrank.compress.targets import Patterns, factorisable
from fullrank.compress.trp import TRP
from fullrank.core.batches import Batch
from fullrank.core.errors import InputError
from fullrank.core.plan import RankPlan
from fullrank.core.rank_rules import Energy

TrainedMethod = Literal["trp", "maestro"]


class TrainedFamily:
    """Plans and models of every size by a method that trains.

    TRP and Maestro are made for the training of the task itself
    (:class:`~fullrank.compress.TRP`, :class:`~fullrank.compress.Maestro`). Here they are given a
    finished model and no labels: a copy is trained once, by the method, to give the original's
    outputs (:class:`~fullrank.compress.Distillation`), and what it has become is then cut to any
    size.

    Parameters
    ----------
    model
        The dense model; it is not changed.
    method
        ``"trp"``: weights are truncated to 98 % of their energy every 20 steps (the paper's), and
        split after the training at the energy that has the size asked for. ``"maestro"``: one
        layer a step runs on a random prefix of its components; sizes are prefixes, given out by
        their importance.
    data, steps, lr, seconds, batch_size, max_length, tokenizer, seed, progress
        See :class:`~fullrank.compress.Distillation`.
    include, exclude
        Name patterns; see :func:`~fullrank.compress.make_plan`.
    faster_on
        See :class:`~fullrank.compress.PlanFamily`.
    checkpoint
        File in which the training is kept, unfinished or done: a family made again of the same
        model, data and settings goes on there.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(16, 16))
    >>> data = [torch.randn(8, 16) for _ in range(10)]
    >>> family = TrainedFamily(model, "maestro", data, steps=5)
    >>> family.plan(0.5)["0"].rank
    4
    """

    def __init__(
        self,
        model: nn.Module,
        method: TrainedMethod,
        data: Iterable[Any],
        *,
        steps: int = 100,
        lr: float = 1e-4,
        seconds: float | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        tokenizer: Callable[..., Any] | None = None,
        seed: int = 0,
        progress: bool = False,
        include: Patterns | None = None,
        exclude: Patterns = (),
        faster_on: Batch | None = None,
        checkpoint: Path | None = None,
    ) -> None:
        if method not in _TRAININGS:
            raise InputError(f"method {method!r}; it is one of {', '.join(_TRAININGS)}")
        self.model, self.method = model, method
        self._faster_on = faster_on
        layers = tuple(factorisable(model, include, exclude))
        training = _TRAININGS[method](
            model,
            data,
            steps=steps,
            lr=lr,
            seconds=seconds,
            batch_size=batch_size,
            max_length=max_length,
            tokenizer=tokenizer,
            seed=seed,
            progress=progress,
            checkpoint=checkpoint,
        )
        self._sizes = training.sizes(copy.deepcopy(model), layers)

    @property
    def smallest(self) -> float:
        """Share of the layers' parameters that the smallest plan keeps."""
        return self._sizes.smallest

    def plan(self, keep: float) -> RankPlan:
        """Return the plan that keeps at most this share of the layers' parameters, in (0, 1]."""
        check_keep(keep)
        plan = self._sizes.plan(keep)
        return plan if self._faster_on is None else faster_only(self.model, plan, self._faster_on)

    def build(self, plan: RankPlan) -> nn.Module:
        """Return the trained model, cut by a plan of this family."""
        return self._sizes.build(plan).train(self.model.training)


def energy_plans(model: nn.Module, layers: Patterns) -> Callable[[float], RankPlan]:
    """Return the plan of each share of the weights' energy; spectra are computed once."""
    spectra = layer_spectra(model, include=layers)

    def plan(energy: float) -> RankPlan:
        rule = Energy(max(energy, 1e-6))
        return make_plan(model, rule, layers, method="svd", spectra=spectra)

    return plan


# -- the trainings ---------------------------------------------------------------------------


class _TRPSizes:
    def __init__(self, model: nn.Module, layers: tuple[str, ...]) -> None:
        self._model, self._plans = model, energy_plans(model, layers)

    @property
    def smallest(self) -> float:
        return self._plans(0.0).savings().kept

    def plan(self, keep: float) -> RankPlan:
        return kept_at_most(keep, self._plans)[1]

    def build(self, plan: RankPlan) -> nn.Module:
        return factorize(copy.deepcopy(self._model), plan, balance="sqrt", progress=False)


class _MaestroSizes:
    def __init__(self, maestro: Maestro) -> None:
        self._maestro = maestro

    @property
    def smallest(self) -> float:
        return self._maestro.smallest

    def plan(self, keep: float) -> RankPlan:
        try:
            return self._maestro.set_ranks(budget=keep)
        finally:
            self._maestro.set_ranks()

    def build(self, plan: RankPlan) -> nn.Module:
        # A layer without a rank runs in full, and is multiplied out.
        ranks = {n: e.rank for n, e in plan.items() if e.rank is not None}
        try:
            self._maestro.set_ranks(ranks)
            return self._maestro.export()
        finally:
            self._maestro.set_ranks()


@dataclass
class _Training(Distillation):
    """Distillation during which a method shrinks: its end is kept, however it compares."""

    _layers: tuple[str, ...] = field(default=(), init=False)

    def train(self, student: nn.Module) -> None:
        with self._both(student) as parameters:
            self._train_steps(student, parameters)

    def _particulars(self) -> dict[str, Any]:
        return {"layers": list(self._layers)}

    def _finish(self, kept: RecoveryCheckpoint, optimizer: torch.optim.Optimizer) -> None:
        kept.write(optimizer, self.steps, self.seconds or 0.0, now=True)


@dataclass
class _TRPTraining(_Training):
    def sizes(self, model: nn.Module, layers: tuple[str, ...]) -> _TRPSizes:
        self._layers = layers
        self._trp = TRP(model, include=layers, skip_first=False)
        self.train(model)
        # Momentum has restored some of the rank since.
        self._trp.refresh()
        return _TRPSizes(model, layers)

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(lambda *_: self._trp.after_backward())

    def _begin(self, step: int, done: bool) -> None:
        if not done:
            self._trp.before_forward(step)


@dataclass
class _MaestroTraining(_Training):
    def sizes(self, model: nn.Module, layers: tuple[str, ...]) -> _MaestroSizes:
        self._layers = layers
        generator = torch.Generator().manual_seed(self.seed)
        self._maestro = Maestro(model, include=layers, generator=generator)
        self.train(model)
        return _MaestroSizes(self._maestro)

    def _begin(self, step: int, done: bool) -> None:
        if done:
            # The draws go on where they stopped.
            with self._maestro.sample():
                pass

    def _loss(self, student: nn.Module, index: int) -> Tensor:
        with self._maestro.sample():
            return super()._loss(student, index) + self._maestro.penalty()


_TRAININGS: dict[str, type[_TRPTraining] | type[_MaestroTraining]] = {
    "trp": _TRPTraining,
    "maestro": _MaestroTraining,
}
