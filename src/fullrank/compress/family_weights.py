"""Families of plans of the methods that look at the weights alone."""

from __future__ import annotations

import copy
from typing import Literal

from torch import nn

from fullrank.compress.factorization import factorize
from fullrank.compress.family import check_keep, kept_at_most
from fullrank.compress.family_uniform import UniformShare
from fullrank.compress.measured_speed import faster_only
from fullrank.compress.pela import OMITTED, pela_plan
from fullrank.compress.planning import layer_spectra, make_plan
from fullrank.compress.targets import Patterns
from fullrank.compress.welore import WeLoreConfig, welore_plan
from fullrank.core.batches import Batch
from fullrank.core.plan import RankPlan
from fullrank.core.rank_rules import FractionOfBreakEven

WeightMethod = Literal["greenformers", "welore", "pela"]


class WeightFamily:
    """Plans and models of every size by a method that needs no data.

    Every layer's spectrum is computed once.

    Parameters
    ----------
    model
        The dense model; it is not changed.
    method
        ``"greenformers"``: the same share of each layer's break-even rank. ``"welore"``: the
        smallest threshold at which no more than the share is left; layers that lose few
        directions stay dense. ``"pela"``: the same share of each layer's parameters, which PELA
        then trains. Where layers stay dense, so that the first and the last keep more than was
        asked, the others get less.
    include, exclude
        Name patterns; see :func:`~fullrank.compress.make_plan`.
    faster_on
        See :class:`~fullrank.compress.PlanFamily`.

    Examples
    --------
    >>> family = WeightFamily(nn.Sequential(nn.Linear(16, 16)), "greenformers")
    >>> family.plan(0.5)["0"].rank
    4
    """

    def __init__(
        self,
        model: nn.Module,
        method: WeightMethod,
        *,
        include: Patterns | None = None,
        exclude: Patterns = (),
        faster_on: Batch | None = None,
    ) -> None:
        self.model, self.method = model, method
        self._include, self._exclude, self._faster_on = include, exclude, faster_on
        # PELA's ranks follow from shapes.
        self._spectra = (
            {} if method == "pela" else layer_spectra(model, include=include, exclude=exclude)
        )
        self._uniform = (
            UniformShare(self._pela, lambda m, n: m * n / (m + n), method)
            if method == "pela"
            else UniformShare(self._greenformers, lambda m, n: m * n // (m + n), method)
        )

    @property
    def smallest(self) -> float:
        """Share of the layers' parameters that the smallest plan keeps."""
        if self.method == "welore":
            return self._welore(1.0).savings().kept
        return self._uniform.smallest

    def plan(self, keep: float) -> RankPlan:
        """Return the plan that keeps at most this share of the layers' parameters, in (0, 1]."""
        check_keep(keep)
        if self.method == "welore":
            # What is kept never grows with the threshold.
            plan = kept_at_most(keep, lambda x: self._welore(1 - x), "welore")[1]
        else:
            plan = self._uniform.at_most(keep)
        return plan if self._faster_on is None else faster_only(self.model, plan, self._faster_on)

    def build(self, plan: RankPlan) -> nn.Module:
        """Return a copy of the model, shrunk by a plan of this family."""
        return factorize(copy.deepcopy(self.model), plan, balance="sqrt", progress=False)

    def _pela(self, fraction: float) -> RankPlan:
        # What the official code omits, unless something else is to be.
        exclude = self._exclude or OMITTED
        return pela_plan(self.model, 1 / fraction, exclude, include=self._include)

    def _greenformers(self, fraction: float) -> RankPlan:
        rule, spectra = FractionOfBreakEven(fraction), self._spectra
        return make_plan(self.model, rule, self._include, self._exclude, spectra=spectra)

    def _welore(self, theta: float) -> RankPlan:
        return welore_plan(self.model, WeLoreConfig(theta=theta), self._spectra)
