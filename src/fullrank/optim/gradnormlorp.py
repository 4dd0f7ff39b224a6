"""GradNormLoRP: GaLore on weight-normalised matrices (arXiv 2412.19616)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fullrank.core.plan import RankPlan
from fullrank.optim import checks as valid
from fullrank.optim.base import ProjectionHook
from fullrank.optim.gradients import NonFinite
from fullrank.optim.inner import AdamW
from fullrank.optim.matrices import Parts, matrix_shape
from fullrank.optim.projected import Gemm, ProjectedOptimizer, Refresh
from fullrank.optim.row_norm import Mode, OfficialRowNorm, RowNorm
from fullrank.optim.subspace import MomentPolicy, ProjType
from fullrank.optim.whole import Identity


class GradNormLoRPAdamW(ProjectedOptimizer):
    """AdamW on ``W = g v / ||v||_row``: on the magnitudes g, and in a subspace on the direction v.

    With ``u = W / g``, the gradients are ``grad_g = rowsum(G u)`` and
    ``grad_v = (g / ||v||) (G - grad_g u)``. v is stepped as GaLore steps a weight, by ``grad_v``
    in a rank-r subspace of it; g, one number a row (an output unit), by Adam with the same betas
    and eps. v is not stored: it follows from W, g and ``||v||``. The state of an ``(m, n)`` matrix
    is that of GaLore and 4 m numbers.

    Parameters
    ----------
    params
        Parameters, named parameters or param groups (see :func:`param_groups`). A group with
        ``rank`` is reparametrised and projected, one without gets AdamW with the same eps
        convention. Every argument but the last four may also be a group's key.
    lr
        1e-3; 0.01 for pre-training, 3e-5 for GLUE.
    betas, eps
        (0.9, 0.999) and 1e-6; eps is added to the uncorrected root.
    weight_decay
        Decoupled, after the step; of g alone, as that of v would only change its effective rate.
    rank
        r, at most ``min(m, n)``.
    update_proj_gap
        Steps between two refreshes of the basis: 250.
    scale
        Factor on the projected update: 0.25 (4 for GLUE at rank 4).
    proj_type
        As for :class:`GaLoreAdamW`; ``"full"`` is the paper's two-sided projection.
    magnitude_lr
        Learning rate of g, whose entries are about as large as a row's norm; None: ``lr``.
    mode
        ``"consistent"``: as above. ``"official"``: as the official code, for parity. v is kept
        whole in the state, so that no memory is saved; the gradient is projected as it is; the
        magnitudes start anew from ``||v||`` every step; both decay. There, what has no rank is
        reparametrised too, vectors as one row.
    refresh, moments, correct_bias, gemm, state_bits, min_8bit_size, stochastic_rounding, generator
        As for :class:`GaLoreAdamW`. Magnitudes stay in 32 bits.
    plan, nonfinite, projection_hook
        See :class:`SubspaceOptimizer`. The hook sees the gradient of v.

    Raises
    ------
    InputError
        On values out of range, parameters that are not real floats, sparse gradients.

    Notes
    -----
    Rows of zeros have no direction. They get plain projected steps until the first that is not
    zero, from which on they have.

    Examples
    --------
    >>> import torch
    >>> weight = torch.nn.Parameter(torch.randn(8, 6))
    >>> optimizer = GradNormLoRPAdamW([weight], lr=0.01, rank=2)
    >>> (weight @ torch.ones(6)).square().sum().backward()
    >>> _ = optimizer.step()
    >>> torch.allclose(weight.norm(dim=1, keepdim=True), optimizer.state[weight]["magnitude"].abs())
    True
    """

    checks: ClassVar[dict[str, valid.Check]] = {
        **valid.ADAM,
        "scale": valid.positive,
        "magnitude_lr": valid.optional(valid.at_least(0.0)),
        "mode": valid.one_of("consistent", "official"),
        "correct_bias": valid.truth,
        **valid.PROJECTED,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        *,
        rank: int | None = None,
        update_proj_gap: int = 250,
        scale: float = 0.25,
        proj_type: ProjType = "std",
        magnitude_lr: float | None = None,
        mode: Mode = "consistent",
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

    def parts(self, group: dict[str, Any]) -> Parts:
        """GaLore's Adam on v, and one for the magnitudes."""
        return Parts(
            AdamW("uncorrected", group["state_bits"], group["min_8bit_size"]),
            reparam=RowNorm() if group["mode"] == "consistent" else OfficialRowNorm(),
            magnitudes=AdamW("uncorrected"),
            scale=float(group["scale"]),
        )

    def choose(self, param: Tensor, group: dict[str, Any], place: tuple[int, int]) -> Any:
        """Return the subspace; one of full rank, too, since only in one is v reparametrised."""
        rank = self.ranks(group)[place[1]]
        if rank is None or param.dim() < 2:
            return Identity()
        shape = matrix_shape(param.shape)
        return self.subspace(group, rank, shape) if rank <= min(shape) else Identity()
