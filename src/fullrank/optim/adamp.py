"""AdamP and SGDP: no step along the weight where the weight is scale-invariant (2006.08217)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim import checks as valid
from fullrank.optim import gradients
from fullrank.optim.foundation import Entry, Spec, State
from fullrank.optim.gradients import NonFinite
from fullrank.optim.inner import AdamW, Batch
from fullrank.optim.inner.adamw import FUSED_DEVICES
from fullrank.optim.radial import RadialTest, project_radial
from fullrank.optim.radial_base import RadialOptimizer, Scratch

__all__ = ["SGDP", "AdamP", "project_radial"]


class AdamP(RadialOptimizer):
    """AdamW without the radial part of its update, where a weight is scale-invariant.

    For weights before a normalisation the part of the update along the weight changes nothing
    but the norm, which then grows and takes the effective learning rate with it. AdamP tests
    each weight of two or more dimensions at every step (:func:`.scale_invariance`)
    and leaves that part out where the test passes; vectors get plain AdamW. Constructor, groups
    and results are those of the package ``adamp``; its saved states load.

    State: ``exp_avg`` and ``exp_avg_sq`` of the weight's shape, in float32 for weights in half
    precision. Under FSDP2 it is spread as the weights are, and only sums by channel are exchanged.

    Parameters
    ----------
    params
        Parameters, named parameters or param groups.
    lr
        1e-3.
    betas, eps
        (0.9, 0.999), 1e-8; eps beside the corrected root, and the least norm in a cosine.
    weight_decay
        Decoupled, before the step: 0 (the official README uses 0.01).
    delta
        Threshold of the test, relative to ``1 / sqrt(d)``: 0.1. With 0 this is AdamW.
    wd_ratio
        The part of the decay that projected weights keep: 0.1.
    nesterov
        Use ``beta1 m + (1 - beta1) g`` in place of ``m``.
    maximize
        Ascend.
    channel_dim
        Dimension that counts the channels: 0; 1 for transposed convolutions. May be a group's.
    nonfinite
        See :class:`~fullrank.optim.FullrankOptimizer`.

    Raises
    ------
    InputError
        On values out of range, sparse gradients, and flattened weights (FSDP1).

    Notes
    -----
    A gradient or weight of zeros has the cosine 0, so it passes; a random gradient of a weight
    with one output channel passes by chance about once in twelve steps.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.tensor([[1.0, 0.02]]))
    >>> optimizer = AdamP([weight], lr=0.3)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     loss = 1 - torch.cosine_similarity(weight, torch.tensor([[0.0, 1.0]])).sum()
    ...     loss.backward()
    ...     _ = optimizer.step()
    >>> optimizer.branch(weight), round(loss.item(), 3)
    (1, 0.0)
    """

    checks: ClassVar[dict[str, valid.Check]] = {
        **RadialOptimizer.checks,
        "betas": valid.pair(valid.decay_factor),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        channel_dim: int = 0,
        nonfinite: NonFinite = "skip",
    ) -> None:
        self._inner = AdamW("corrected")
        super().__init__(params, locals())

    def state_spec(self, param: Tensor, group: dict[str, Any]) -> Spec:
        """Two moments."""
        wide = torch.promote_types(param.dtype, torch.float32)
        return self._inner.expected(tuple(param.shape), wide)

    def advance_one(
        self, entry: Entry, found: RadialTest | None, skip: Tensor | None, scratch: Scratch
    ) -> None:
        """AdamW's step in one pass where nothing is projected, its step apart otherwise."""
        group, state, param = entry.group, entry.state, entry.param
        unseen = state["unseen"]
        known = gradients.host_decides(unseen.device)
        age = state["step"].item() - (unseen.item() if known else unseen)
        if group["nesterov"]:
            state = self._ahead(entry, skip)
        batch = Batch(group=group, age=age, small=[entry.grad], states=[state], skip=skip)
        lr = float(group["lr"])
        decay = lr * group["weight_decay"]
        batch.weights = [param if found is None else scratch.like(param, 1).zero_()]
        beta = 1.0 - decay if found is None else 1.0
        if not known:
            batch.age = age.reshape(1)
        if self._inner.dense(batch, alpha=1.0, beta=beta):
            if found is not None:
                self.move(entry, batch.weights[0], 1.0, decay, found, skip, scratch.of(param))
            return
        batch.small = [entry.grad.to(state["exp_avg"].dtype).contiguous()]
        batch.direction = [torch.empty_like(batch.small[0])]
        self._inner.direction(batch)
        self.move(entry, batch.direction[0], -lr, decay, found, skip, scratch.of(param))

    @staticmethod
    def _ahead(entry: Entry, skip: Tensor | None) -> State:
        """Update the mean, and return a state whose mean Adam's rule takes one step further.

        Its ``beta1 m + (1 - beta1) g`` is then Nesterov's numerator, from the mean m at hand.
        """
        mean, b1 = entry.state["exp_avg"], entry.group["betas"][0]
        grad = entry.grad.to(mean.dtype)
        if skip is not None:
            grad = torch.where(skip, mean, grad)
        mean.lerp_(grad, 1.0 - b1)
        return {**entry.state, "exp_avg": mean.clone()}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_inner": self._inner}


class SGDP(RadialOptimizer):
    """Momentum SGD without the radial part of its update, where a weight is scale-invariant.

    See :class:`AdamP`. The buffer starts at 0, so dampening counts in the first step too (torch's
    SGD starts with the gradient), and the decay is decoupled, divided by ``1 - momentum``: what
    coupled decay adds up to through the momentum.

    State: ``momentum`` of the weight's shape, in float32 for weights in half precision.

    Parameters
    ----------
    params
        Parameters, named parameters or param groups.
    lr
        Required (the official README uses 0.1).
    momentum, dampening
        0 and 0 (README: momentum 0.9).
    weight_decay
        0 (README: 1e-5).
    nesterov
        Use ``g + momentum * buf`` in place of ``buf`` (README: True).
    eps, delta, wd_ratio
        1e-8, 0.1, 0.1: see :class:`AdamP`.
    project_buffer
        Without ``nesterov``, the official code also takes the radial part out of the momentum
        buffer, by aliasing; the paper projects the update alone. False is the paper's.
    maximize, channel_dim, nonfinite
        See :class:`AdamP`.

    Raises
    ------
    InputError
        On values out of range, among them a momentum of 1 and ``nesterov`` without momentum.

    Examples
    --------
    >>> weight = torch.nn.Parameter(torch.ones(2, 2))
    >>> optimizer = SGDP([weight], lr=0.5, momentum=0.9)
    >>> weight.grad = torch.tensor([[1.0, -1.0], [2.0, 0.0]])
    >>> _ = optimizer.step()
    >>> weight.data
    tensor([[0.5000, 1.5000],
            [0.0000, 1.0000]])
    """

    checks: ClassVar[dict[str, valid.Check]] = {
        **RadialOptimizer.checks,
        "momentum": valid.decay_factor,
        "dampening": valid.finite,
        "project_buffer": valid.truth,
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        project_buffer: bool = False,
        *,
        maximize: bool = False,
        channel_dim: int = 0,
        nonfinite: NonFinite = "skip",
    ) -> None:
        super().__init__(params, locals())

    def check_group(self, group: dict[str, Any]) -> None:
        """Nesterov's step is one ahead of a momentum that must be there."""
        super().check_group(group)
        if group["nesterov"] and group["momentum"] == 0:
            raise InputError("nesterov=True needs a momentum above 0, e.g. momentum=0.9")

    def state_spec(self, param: Tensor, group: dict[str, Any]) -> Spec:
        """One buffer."""
        wide = torch.promote_types(param.dtype, torch.float32)
        return {"momentum": (tuple(param.shape), wide)}

    def advance_one(
        self, entry: Entry, found: RadialTest | None, skip: Tensor | None, scratch: Scratch
    ) -> None:
        """Update the buffer, step, and project the buffer where that is asked for."""
        if skip is None and self._advance_by_kernel(entry, found, scratch):
            return
        group, param, buffer = entry.group, entry.param, entry.state["momentum"]
        mu, lr = group["momentum"], float(group["lr"])
        grad = entry.grad.to(buffer.dtype)
        fresh = grad if group["dampening"] == 0 else grad * (1.0 - group["dampening"])
        new = torch.add(fresh, buffer, alpha=mu, out=buffer if skip is None else None)
        update = new
        if group["nesterov"]:
            update = torch.add(grad, new, alpha=mu, out=scratch.like(param, 1))
        if skip is not None:
            buffer.copy_(torch.where(skip, buffer, new))
            update = torch.where(skip, 0.0, update)
        decay = lr * group["weight_decay"] / (1.0 - mu)
        aliased = group["project_buffer"] and not group["nesterov"] and found is not None
        before = param.to(buffer.dtype, copy=True) if aliased else None
        radial = self.move(entry, update, -lr, decay, found, skip, scratch.of(param))
        if before is not None and radial is not None:
            # Where the step is skipped the update is 0, and so is what it holds of the weight.
            buffer.addcmul_(before, radial.expand_as(before), value=-1.0)

    @staticmethod
    def _advance_by_kernel(entry: Entry, found: RadialTest | None, scratch: Scratch) -> bool:
        """Do all of it in one pass over weight, gradient and buffer, if torch's kernel can."""
        group, param, grad = entry.group, entry.param, entry.grad
        buffer, mu, nesterov = entry.state["momentum"], group["momentum"], group["nesterov"]
        alike = all(t.dtype == param.dtype and t.is_contiguous() for t in (param, grad, buffer))
        apart = found is not None and group["project_buffer"] and not nesterov
        if not alike or apart or mu == 0 or param.device.type not in FUSED_DEVICES:
            return False
        lr, fresh = float(group["lr"]), 1.0 - group["dampening"]
        decay = lr * group["weight_decay"] / (1.0 - mu)
        factor: float | Tensor = 1.0 - decay
        if found is not None:
            # What the update will hold of the weight follows from what gradient and buffer hold.
            along = found.channels.dots(param, buffer, scratch.of(param))
            along = along.mul_(mu).add_(found.dots, alpha=fresh)
            if nesterov:
                along = along.mul_(mu).add_(found.dots)
            factor = 1.0 - decay * found.kept_decay(group["wd_ratio"])
            factor = found.held(along, param).mul_(lr).add_(factor)
        if isinstance(factor, Tensor) or factor != 1.0:
            param.mul_(factor)
        torch._fused_sgd_(
            [param],
            [grad],
            [buffer],
            weight_decay=0.0,
            momentum=mu,
            lr=lr,
            dampening=group["dampening"],
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,
        )
        return True
