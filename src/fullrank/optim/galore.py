"""GaLore: Adam and Adafactor with moments in a subspace of the gradient (arXiv 2403.03507)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch

from fullrank.core.errors import InputError
from fullrank.core.plan import RankPlan
from fullrank.optim import checks as valid
from fullrank.optim.base import ProjectionHook
from fullrank.optim.gradients import NonFinite
from fullrank.optim.inner import Adafactor, AdamW
from fullrank.optim.matrices import Parts
from fullrank.optim.projected import Gemm, ProjectedOptimizer, Refresh
from fullrank.optim.subspace import MomentPolicy, ProjType


class GaLoreAdamW(ProjectedOptimizer):
    """AdamW whose moments live in a rank-r subspace of each gradient; weights stay full.

    For an ``(m, n)`` matrix the state is ``2 r max(m, n)`` moments and ``r min(m, n)`` numbers of
    basis, instead of ``2 m n``. The constructor and the groups are those of ``galore_torch``: a
    group with ``rank`` is projected, one without gets AdamW with the same eps convention. Every
    argument but the last four may also be a group's key.

    Parameters
    ----------
    params
        Parameters, named parameters or param groups (see :func:`param_groups`).
    lr
        0.01 (paper: 0.005 for 7B). ``scale`` gives projected matrices a part of it.
    betas, eps
        (0.9, 0.999) and 1e-6, as the official code; eps is added to the uncorrected root.
    weight_decay
        Decoupled; taken off the weight that was already updated, as in the official code.
    rank
        r; None projects nothing. A group may list one rank (or None) a parameter. Weights with
        more than two dimensions are read as ``(out, rest)``; vectors, and matrices with
        ``min(m, n) <= r``, are not projected.
    update_proj_gap
        Steps between two refreshes of the basis: 200 (paper; 500 for 7B). Each matrix counts
        the steps that brought it a gradient; a gradient of zeros keeps the old basis.
    scale
        Factor on the projected update: 0.25 (paper).
    proj_type
        ``"std"`` compresses the shorter side; ``"reverse_std"``, ``"left"``, ``"right"``,
        ``"full"`` (both sides).
    refresh
        ``"svd"``: leading singular vectors of the current gradient, exactly. ``"subspace"``:
        power iteration from the old basis, many times cheaper; falls back to a decomposition
        where that would capture less than 99.9 % of the SVD's energy, and logs it.
    moments
        At a refresh: ``"keep"`` reads the moments in the new basis as they are (paper; signs of
        basis vectors are aligned with the old ones), ``"reset"`` starts them and their bias
        correction over, ``"rotate"`` re-expresses the first moment in the new basis. The second
        one is not rotated: where it was almost nothing, which 8 bits round to nothing, the first
        steps in the new basis can be very large, most of all with ``proj_type="full"``.
    gemm
        ``"bfloat16"``: matrix products into and out of the subspace round their factors to
        bfloat16 and add up in float32, faster where the hardware has such products. Bases,
        moments and weights stay as they are. None (default): in the weights' dtype.
    state_bits
        32, or 8 for moments in blockwise codes (projected or not; bases stay as they are).
    correct_bias
        False leaves out Adam's bias correction.
    min_8bit_size
        With ``state_bits=8``, moments of fewer elements stay float32: 4096.
    stochastic_rounding
        Round bfloat16 weights up or down at random, so that small steps are not lost.
    generator
        Seed of that rounding: a number or a generator to draw one from; None is 0.
    plan, nonfinite, projection_hook
        See :class:`SubspaceOptimizer`.

    Raises
    ------
    InputError
        On values out of range, parameters that are not real floats, sparse gradients.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Linear(16, 8)
    >>> groups = [{"params": [model.weight], "rank": 2}, {"params": [model.bias]}]
    >>> optimizer = GaLoreAdamW(groups, lr=0.01)
    >>> model(torch.ones(4, 16)).square().sum().backward()
    >>> _ = optimizer.step()
    >>> {name: tuple(value.shape) for name, value in optimizer.state[model.weight].items()}
    {'step': (), 'unseen': (), 'exp_avg': (2, 16), 'exp_avg_sq': (2, 16), 'basis_left': (8, 2)}
    """

    checks: ClassVar[dict[str, valid.Check]] = {
        **valid.ADAM,
        "scale": valid.positive,
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
        scale: float = 0.25,
        proj_type: ProjType = "std",
        refresh: Refresh = "svd",
        moments: MomentPolicy = "keep",
        gemm: Gemm | None = None,
        state_bits: Literal[32, 8] = 32,
        correct_bias: bool = True,
        min_8bit_size: int = 4096,
        stochastic_rounding: bool = False,
        generator: torch.Generator | int | None = None,
        plan: RankPlan | None = None,
        nonfinite: NonFinite = "skip",
        projection_hook: ProjectionHook | None = None,
    ) -> None:
        super().__init__(params, locals())

    def parts(self, group: dict[str, Any]) -> Parts:
        """Adam with eps beside the uncorrected root, and nothing outside."""
        inner = AdamW("uncorrected", group["state_bits"], group["min_8bit_size"])
        return Parts(inner, scale=float(group["scale"]))


class GaLoreAdafactor(ProjectedOptimizer):
    """Adafactor whose factored second moment lives in a rank-r subspace of each gradient.

    Groups and the arguments from ``rank`` on are those of :class:`GaLoreAdamW`; the others are the
    original's (arXiv 1804.04235). Weights decay before the update. The factors of the second
    moment stay in 32 bits.

    Parameters
    ----------
    params
        Parameters, named parameters or param groups.
    lr
        Learning rate; None with ``relative_step``, which then sets it.
    eps
        Added to the squared gradient, and the least root mean square of a weight for
        ``scale_parameter``: (1e-30, 1e-3).
    clip_threshold
        Largest root mean square of an update: 1.
    decay_rate
        The second moment's factor at step t is ``1 - t ** decay_rate``: -0.8.
    beta1
        Factor of a first moment over the updates; None (default) keeps none.
    scale_parameter
        Multiply the rate by the weight's root mean square.
    relative_step, warmup_init
        Derive the rate from the step: ``min(1e-2, 1 / sqrt(t))``, or ``min(1e-6 t, 1 / sqrt(t))``
        with ``warmup_init``.
    rank, update_proj_gap, scale, proj_type, refresh, moments, gemm, state_bits, min_8bit_size, ...
        As for :class:`GaLoreAdamW`.

    Raises
    ------
    InputError
        On values out of range, ``lr`` together with ``relative_step``, or neither.

    Examples
    --------
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.ones(6, 4))
    >>> optimizer = GaLoreAdafactor([weight], lr=0.1, rank=2, relative_step=False)
    >>> (weight * torch.arange(4.0)).square().sum().backward()
    >>> _ = optimizer.step()
    >>> sorted(optimizer.state[weight])
    ['basis_right', 'exp_avg_sq_col', 'exp_avg_sq_row', 'step', 'unseen']
    """

    decay_first: ClassVar[bool] = True
    checks: ClassVar[dict[str, valid.Check]] = {
        "lr": valid.optional(valid.at_least(0.0)),
        "eps": valid.pair(valid.at_least(0.0)),
        "clip_threshold": valid.positive,
        "decay_rate": valid.finite,
        "beta1": valid.optional(valid.decay_factor),
        "scale_parameter": valid.truth,
        "relative_step": valid.truth,
        "warmup_init": valid.truth,
        "weight_decay": valid.at_least(0.0),
        "scale": valid.positive,
        **valid.PROJECTED,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        *,
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 0.25,
        proj_type: ProjType = "std",
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

    def check_group(self, group: dict[str, Any]) -> None:
        """A learning rate comes from the group or from the step, not from both or neither."""
        super().check_group(group)
        if (group["lr"] is None) != group["relative_step"]:
            raise InputError(
                f"lr={group['lr']!r} with relative_step={group['relative_step']!r}: give a "
                "learning rate and relative_step=False, or neither"
            )
        if group["warmup_init"] and not group["relative_step"]:
            raise InputError("warmup_init=True needs relative_step=True")

    def parts(self, group: dict[str, Any]) -> Parts:
        """Adafactor, with a first moment where ``beta1`` asks for one."""
        first = group["beta1"] is not None
        inner = Adafactor(first, group["state_bits"], group["min_8bit_size"])
        return Parts(inner, scale=float(group["scale"]))
