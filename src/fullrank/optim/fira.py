"""Fira: GaLore, and the rest of the gradient scaled as Adam scaled the kept part (2410.01623)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch

from fullrank.core.errors import InputError
from fullrank.core.plan import RankPlan
from fullrank.optim import checks as valid
from fullrank.optim.base import ProjectionHook
from fullrank.optim.gradients import NonFinite
from fullrank.optim.inner import AdamW, InnerUpdate, RMSprop
from fullrank.optim.matrices import Parts
from fullrank.optim.outside import ScaledResidual, scaled_side
from fullrank.optim.projected import Gemm, ProjectedOptimizer, Refresh
from fullrank.optim.subspace import MomentPolicy, ProjType

Residual = Literal["official", "orthogonal"]


def _above_one(name: str, value: Any) -> None:
    valid.finite(name, value)
    if value <= 1:
        raise InputError(f"{name}={value!r}; it must be > 1, or None for no limit")


_RESIDUAL: dict[str, valid.Check] = {
    "alpha": valid.positive,
    "limiter": valid.optional(_above_one),
    "residual": valid.one_of("official", "orthogonal"),
    "zero_start": valid.truth,
}


class _Fira(ProjectedOptimizer):
    """What both forms share: the scaled residual outside the subspace."""

    def check_group(self, group: dict[str, Any]) -> None:
        """The residual is scaled by lines, of which a projection of both sides leaves none."""
        super().check_group(group)
        scaled_side(group["proj_type"])

    def rule(self, group: dict[str, Any]) -> InnerUpdate:
        """Return the inner update of a group."""
        raise NotImplementedError

    def parts(self, group: dict[str, Any]) -> Parts:
        """The inner rule in the subspace, the scaled residual outside."""
        alpha = float(group["alpha"])
        leak = alpha if group["residual"] == "official" else 1.0
        outside = ScaledResidual(leak, group["limiter"], group["zero_start"])
        return Parts(self.rule(group), outside, scale=alpha)


class FiraAdamW(_Fira):
    """AdamW in a rank-r subspace of each gradient, and the rest of the gradient beside it.

    Where GaLore throws away what lies outside the subspace, Fira applies it, each line scaled by
    how much Adam scaled the same line inside, at one number of state more for a matrix. A limiter
    keeps spikes out: the residual's norm grows by at most 1 % a step.

    With ``R = down(G)``, Adam's direction N and step size s, ``S = G - alpha up(R)``,
    ``phi_i = ||N_i|| / ||R_i||`` for every line of the longer side, and the limiter l:
    ``W <- W - s (alpha up(N) + phi S / l)``. The step costs two matrix products, as GaLore's: phi
    commutes with the projection.

    Parameters
    ----------
    params
        Parameters, named parameters or param groups (see :func:`param_groups`). A group with
        ``rank`` is projected, one without gets AdamW with the same eps convention. Every argument
        but the last four may also be a group's key.
    lr
        0.01 (paper: 0.005 for 7B; 1e-4 for fine-tuning).
    betas, eps, weight_decay
        As for :class:`GaLoreAdamW`: (0.9, 0.999), 1e-6, and decay after the step.
    rank, update_proj_gap
        r, and the steps between two refreshes of the basis: 200 (7B: 500).
    alpha
        Factor on the projected update: 0.25 (paper; 0.0625 for 7B, 1 for fine-tuning).
    proj_type
        As for :class:`GaLoreAdamW`, but not ``"full"``.
    limiter
        Largest growth of the residual's norm from step to step: 1.01 (paper, section 4.2); None
        for no limit.
    residual
        ``"official"``: S as above, with alpha, as in the code that the published figures are from;
        ``"orthogonal"``: ``S = G - up(R)``, as in the paper. They agree at alpha = 1.
    zero_start
        True lets a residual of zero start the limiter, as in the official code; it then stays
        near zero for a thousand steps. By default the first that is not zero starts it.
    refresh, moments, correct_bias, gemm, state_bits, min_8bit_size, stochastic_rounding, generator
        As for :class:`GaLoreAdamW`.
    plan, nonfinite, projection_hook
        See :class:`SubspaceOptimizer`.

    Raises
    ------
    InputError
        On values out of range, ``proj_type="full"``, parameters that are not real floats, sparse
        gradients.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(16, 8)
    >>> groups = [{"params": [model.weight], "rank": 2}, {"params": [model.bias]}]
    >>> optimizer = FiraAdamW(groups, lr=0.01)
    >>> model(torch.ones(4, 16)).square().sum().backward()
    >>> _ = optimizer.step()
    >>> sorted(optimizer.state[model.weight])
    ['basis_left', 'exp_avg', 'exp_avg_sq', 'residual_norm', 'step', 'unseen']
    """

    checks: ClassVar[dict[str, valid.Check]] = {
        **valid.ADAM,
        **_RESIDUAL,
        "correct_bias": valid.truth,
        **valid.PROJECTED,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        alpha: float = 0.25,
        proj_type: ProjType = "std",
        limiter: float | None = 1.01,
        residual: Residual = "official",
        zero_start: bool = False,
        refresh: Refresh = "svd",
        moments: MomentPolicy = "keep",
        gemm: Gemm | None = None,
        correct_bias: bool = True,
        state_bits: Literal[32, 8] = 32,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = False,
        generator: torch.Generator | int | None = None,
        plan: RankPlan | None = None,
        nonfinite: NonFinite = "skip",
        projection_hook: ProjectionHook | None = None,
    ) -> None:
        super().__init__(params, locals())

    def rule(self, group: dict[str, Any]) -> AdamW:
        """Adam with eps beside the uncorrected root."""
        return AdamW("uncorrected", group["state_bits"], group["min_8bit_size"])


class FiraRMSprop(_Fira):
    """The RMSprop form of :class:`FiraAdamW`: ``N = R / (sqrt(V) + eps)``, and s is the rate.

    Parameters
    ----------
    lr, beta, eps
        1e-3, 0.9 and 1e-6, as in the official code.
    momentum
        Of N; 0 (default) keeps none.
    centered
        Take the mean of the gradient off under the root.
    weight_decay
        Decoupled, after the step (the official code has none).
    params, rank, ...
        As for :class:`FiraAdamW`.

    Raises
    ------
    InputError
        As for :class:`FiraAdamW`.

    Examples
    --------
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = FiraRMSprop([weight], lr=0.1, rank=2)
    >>> (weight * torch.arange(4.0)).square().sum().backward()
    >>> _ = optimizer.step()
    >>> sorted(optimizer.state[weight])
    ['basis_right', 'residual_norm', 'square_avg', 'step', 'unseen']
    """

    checks: ClassVar[dict[str, valid.Check]] = {
        "lr": valid.at_least(0.0),
        "beta": valid.decay_factor,
        "eps": valid.at_least(0.0),
        "weight_decay": valid.at_least(0.0),
        "momentum": valid.decay_factor,
        "centered": valid.truth,
        **_RESIDUAL,
        **valid.PROJECTED,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        beta: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        alpha: float = 0.25,
        proj_type: ProjType = "std",
        limiter: float | None = 1.01,
        residual: Residual = "official",
        zero_start: bool = False,
        refresh: Refresh = "svd",
        moments: MomentPolicy = "keep",
        gemm: Gemm | None = None,
        state_bits: Literal[32, 8] = 32,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = False,
        generator: torch.Generator | int | None = None,
        plan: RankPlan | None = None,
        nonfinite: NonFinite = "skip",
        projection_hook: ProjectionHook | None = None,
    ) -> None:
        super().__init__(params, locals())

    def rule(self, group: dict[str, Any]) -> RMSprop:
        """RMSprop, with what the group asks for."""
        bits, least = group["state_bits"], group["min_8bit_size"]
        return RMSprop(group["momentum"] > 0, group["centered"], bits, least)
