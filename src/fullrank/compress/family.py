"""A nested family of plans for one model: one for every size, each cheap to build."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Literal, Protocol

import numpy as np
from torch import nn

from fullrank.compress.allocation import allocate, curves_from
from fullrank.compress.calibration import CalibrationStats
from fullrank.compress.data_checks import (
    few_samples,
    leave_dense,
    nothing_to_go_by,
    warn_of_few,
)
from fullrank.compress.factorization import mark, replace_modules
from fullrank.compress.family_uniform import UniformShare
from fullrank.compress.layers_build import factorised_layer
from fullrank.compress.matrices import matricise
from fullrank.compress.measured_speed import faster_only
from fullrank.compress.planning import entry_for, solved
from fullrank.compress.solvers import Decomposition, Method
from fullrank.compress.targets import Patterns, factorisable
from fullrank.core.batches import Batch
from fullrank.core.errors import InputError
from fullrank.core.names import model_fingerprint
from fullrank.core.plan import RankPlan
from fullrank.core.progress import progress as progress_bar
from fullrank.core.rank_rules import LayerSpectrum, ParamRatio

Allocation = Literal["sensitivity", "uniform"]

# Halvings of the range of a threshold: beyond this two plans are one.
_HALVINGS = 40


class Family(Protocol):
    """Plans and models of every size, by one method."""

    @property
    def smallest(self) -> float:
        """Share of the layers' parameters that the smallest plan keeps."""

    def plan(self, keep: float) -> RankPlan:
        """Return the plan that keeps this share of the layers' parameters."""

    def build(self, plan: RankPlan) -> nn.Module:
        """Return a copy of the model, shrunk by a plan of this family."""


def check_keep(keep: float) -> None:
    """Raise unless a share to keep lies in (0, 1]."""
    if not 0 < keep <= 1:
        raise InputError(f"the share to keep is {keep}; it must lie in (0, 1]")


def kept_at_most(
    share: float, plan: Callable[[float], RankPlan], method: str = "the method"
) -> tuple[float, RankPlan]:
    """Find the largest number in [0, 1] whose plan keeps no more than a share.

    Raises
    ------
    InputError
        When even the plan of 0 keeps more.
    """
    low, high = 0.0, 1.0
    best = plan(low)
    if (least := best.savings().kept) > share:
        raise InputError(
            f"{method} keeps at least {least:.1%} of these layers; {share:.1%} was asked"
        )
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        tried = plan(middle)
        if tried.savings().kept <= share:
            low, best = middle, tried
        else:
            high = middle
    return low, best


class PlanFamily:
    """Plans and models of every size between the smallest and the dense one.

    Every layer is decomposed once; a plan then only says how many of its components to keep.

    Parameters
    ----------
    model
        The dense model; it is not changed.
    stats
        What its layers saw; with gradients for ``method="gauss_newton"``.
    method
        How factors are made; see :func:`~fullrank.compress.decompose`.
    allocation
        ``"sensitivity"``: ranks of least predicted loss (losses of ``"gauss_newton"`` are of the
        model's output and comparable between layers; those of other methods are counted
        relative to each layer's total). ``"uniform"``: every layer keeps the same share; where
        that leaves some dense, the others keep less.
    grid
        Ranks are multiples of this.
    include, exclude
        Name patterns; see :func:`~fullrank.compress.make_plan`.
    faster_on
        A batch of the size that the model will serve: plans leave those layers dense whose
        factors are measured to be slower on it than the layer itself. They may then keep a
        little more than asked.
    progress
        Show a bar over the layers.

    Raises
    ------
    InputError
        When no layer saw calibration data.
    """

    def __init__(
        self,
        model: nn.Module,
        stats: CalibrationStats,
        *,
        method: Method = "gauss_newton",
        allocation: Allocation = "sensitivity",
        grid: int = 8,
        include: Patterns | None = None,
        exclude: Patterns = (),
        faster_on: Batch | None = None,
        progress: bool = False,
    ) -> None:
        if allocation not in ("sensitivity", "uniform"):
            raise InputError(f"allocation {allocation!r}; it is 'sensitivity' or 'uniform'")
        self.model, self.method, self.allocation = model, method, allocation
        self._faster_on = faster_on
        self._modules = factorisable(model, include, exclude)
        self._solved: dict[str, Decomposition] = {}
        self._schemes: dict[str, str] = {}
        dense: dict[str, str] = {}
        with progress_bar("decompose", len(self._modules), progress, "layers") as advance:
            for name, module in self._modules.items():
                layer = stats.get(name)
                # A layer that the model never uses (a pooler) is left out of all accounts.
                found = matricise(module)
                # One convolution in groups is several matrices, which these methods do not read.
                if layer is not None and layer.serves(method) and found.stack == 1:
                    if why := nothing_to_go_by(layer, method):
                        dense[name] = why
                    else:
                        self._solved[name] = solved(name, found, method, layer)
                        self._schemes[name] = found.scheme
                advance(1)
        leave_dense(dense, bool(self._solved))
        if not self._solved:
            raise InputError(
                "none of the model's layers saw calibration data"
                + (", with gradients=True" if method == "gauss_newton" else "")
            )
        if method != "svd":
            warn_of_few(few_samples({name: stats[name] for name in self._solved}))
        self._fingerprint = model_fingerprint(model)
        self._curves = curves_from(self.spectra, grid, relative=method != "gauss_newton")
        self._uniform = UniformShare(self._same_share, lambda m, n: m * n / (m + n), method)

    @property
    def spectra(self) -> Mapping[str, LayerSpectrum]:
        """Square roots of what dropping each component costs, by layer."""
        return {
            name: LayerSpectrum(np.sqrt(s.loss.cpu().numpy())[: min(s.weight.shape)], _shape(s))
            for name, s in self._solved.items()
        }

    @property
    def smallest(self) -> float:
        """Share of the layers' parameters that the smallest plan keeps."""
        if self.allocation == "uniform":
            return self._uniform.smallest
        dense = sum(curve.steps[-1].size for curve in self._curves.values())
        return sum(curve.steps[0].size for curve in self._curves.values()) / dense

    def plan(self, keep: float) -> RankPlan:
        """Return the plan that keeps this share of the layers' parameters, in (0, 1]."""
        check_keep(keep)
        if self.allocation == "uniform":
            plan = self._uniform.at_most(keep)
        else:
            plan = self._planned(allocate(self._curves, keep), keep)
        return plan if self._faster_on is None else faster_only(self.model, plan, self._faster_on)

    def _same_share(self, share: float) -> RankPlan:
        rule = ParamRatio(1 / share)
        ranks = {n: rule(np.empty(0), *_shape(s)) for n, s in self._solved.items()}
        return self._planned(ranks, share)

    def _planned(self, ranks: Mapping[str, int | None], share: float) -> RankPlan:
        reason = f"{self.allocation} at {share:.1%}"
        return RankPlan(
            {
                n: entry_for(_shape(s), ranks[n], self.method, reason, self._schemes[n])
                for n, s in self._solved.items()
            },
            source="weight" if self.method == "svd" else "activation",
            fingerprint=self._fingerprint,
        )

    def build(self, plan: RankPlan) -> nn.Module:
        """Return a copy of the model, shrunk by a plan of this family."""
        new = {
            name: factorised_layer(self._modules[name], entry, self._solved[name], "sqrt")
            for name, entry in plan.items()
            if entry.rank is not None
        }
        model = copy.deepcopy(self.model)
        replace_modules(model, new)
        mark(model)
        return model


def _shape(solved: Decomposition) -> tuple[int, int]:
    m, n = solved.weight.shape
    return m, n
