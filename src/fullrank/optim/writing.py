"""The last part of a step: from the inner update's direction to the weight."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fullrank.optim.chunks import Member
from fullrank.optim.foundation import unless
from fullrank.optim.inner import Batch
from fullrank.optim.matrices import Slot
from fullrank.optim.outside import Move
from fullrank.optim.rounding import stochastic_round_
from fullrank.optim.seeds import generator_for
from fullrank.optim.sharded import is_sharded, local, scatter_
from fullrank.optim.whole import Identity

_HALF = (torch.bfloat16, torch.float16)


# Arrays of at most so many elements stay for the next step, as a CPU's allocator would give their
# pages back to the system, which hands them out anew one by one.
_KEPT = 1 << 19


class Writer:
    """Writes steps; owns the arrays that are worked in meanwhile.

    Parameters
    ----------
    decay_first
        Whether weights decay before the step, or after it.
    """

    def __init__(self, decay_first: bool) -> None:
        self.decay_first = decay_first
        self._buffers: dict[tuple[Any, ...], Tensor] = {}
        self._views: dict[tuple[Any, ...], list[Tensor]] = {}

    # -- gradients -------------------------------------------------------------------------

    def gradient(self, member: Member, keep: bool = False) -> Tensor:
        """Return the gradient that the subspace sees; in memory of its own with ``keep``."""
        reparam = member.slot.reparam
        if reparam is None:
            return member.grad
        out = torch.empty_like(member.grad) if keep else self.scratch(member.grad)
        grad, member.radial = reparam.gradients(member.weight, member.grad, member.state, out)
        return grad

    def scratch(self, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return an array like another to work in, which the next call may return again."""
        buffer = self._buffer("scratch", like.device, dtype or like.dtype, like.numel())
        return buffer.view(like.shape)

    def small_arrays(self, members: list[Member], name: str) -> list[Tensor]:
        """Return one array of the small shape a matrix; the next chunk gets the same memory."""
        # The whole of a sharded parameter is, here, this process' part of it.
        shapes = [
            m.grad.shape if isinstance(m.slot.subspace, Identity) else m.slot.small_shape
            for m in members
        ]
        device, dtype = members[0].weight.device, members[0].slot.moments_dtype
        key = (name, device, dtype, *shapes)
        if key not in self._views:
            sizes = [math.prod(shape) for shape in shapes]
            parts = torch.split(self._buffer(name, device, dtype, sum(sizes)), sizes)
            self._views[key] = [p.view(shape) for p, shape in zip(parts, shapes, strict=True)]
        return self._views[key]

    def _buffer(self, name: str, device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
        key = (name, device, dtype)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < size:
            buffer = torch.empty(size, device=device, dtype=dtype)
            self._buffers[key] = buffer
            # Views of the old one would keep it.
            self._views.clear()
        return buffer[:size]

    def trim(self) -> None:
        """Give back what is not small, until the next step."""
        large = [key for key, buffer in self._buffers.items() if buffer.numel() > _KEPT]
        for key in large:
            del self._buffers[key]
        if large:
            self._views.clear()

    # -- whole batches ---------------------------------------------------------------------

    def dense(self, batch: Batch, slot: Slot) -> bool:
        """Step parameters that are not projected in one pass over everything, if that can be."""
        group = batch.group
        if batch.skip is not None or group["lr"] is None or _rounds(slot):
            return False
        beta = _decay(group, group["lr"])
        alpha = slot.scale * (1.0 if self.decay_first else beta)
        return slot.inner.dense(batch, alpha, beta)

    def write(self, members: list[Member], batch: Batch, size: float | Tensor) -> None:
        """Change the weights.

        Parameters
        ----------
        members
            The matrices.
        batch
            What the inner update has worked on.
        size
            The inner update's step size; a tensor holds one a matrix.
        """
        slot = members[0].slot
        steps = self._magnitude_steps(members, batch) if slot.reparam is not None else None
        sizes = _one_each(size, len(members))
        rates = batch.lr if batch.lr is not None else [batch.group["lr"]] * len(members)
        special = slot.outside is not None or slot.reparam is not None
        # What keeps a direction of a weight's size is put back from a copy.
        undone = batch.skip if slot.reparam is not None and slot.reparam.whole else None
        if special:
            batch.small = batch.clean()
        for i, member in enumerate(members):
            with self._opened(member, undone, special) as weight:
                if not special:
                    self._inside(member, weight, batch, i, sizes[i], rates[i])
                    continue
                # The decay of magnitudes is the reparametrisation's own.
                apart = None
                if batch.skip is not None and slot.reparam is None:
                    apart = _decay_apart(batch.group, rates[i], batch)
                if apart is not None and self.decay_first:
                    weight.mul_(apart)
                move = self._move(member, weight, batch, i, sizes[i])
                if steps is None:
                    assert slot.outside is not None
                    slot.outside(move)
                else:
                    assert member.slot.reparam is not None
                    decay = _decay(batch.group, _magnitude_lr(batch.group))
                    member.slot.reparam.write(move, steps[i], decay)
                if apart is not None and not self.decay_first:
                    weight.mul_(apart)

    # -- one matrix ------------------------------------------------------------------------

    def _opened(
        self, member: Member, skip: Tensor | None, wide: bool
    ) -> AbstractContextManager[Tensor]:
        """Give the weight to be changed: itself, or a copy of it that is put back."""
        param, weight = member.slot.param, member.weight
        if (
            skip is not None
            or is_sharded(param)
            or param.dtype in _HALF
            or weight.data_ptr() != param.data_ptr()
        ):
            return self._copied(member, skip, wide)
        return nullcontext(weight)

    @contextmanager
    def _copied(self, member: Member, skip: Tensor | None, wide: bool) -> Iterator[Tensor]:
        """Give the weight to be changed, wider where steps would be lost, and put it back."""
        slot = member.slot
        param, weight, rounds = slot.param, member.weight, _rounds(slot)
        apart = is_sharded(param) and not slot.spreads
        if apart:
            # The weight is a copy of all of it; this process writes its own part of that.
            param = member.weight
        elif is_sharded(param):
            param = local(param)
        kept = [param, *slot.own_state(member.state)] if skip is not None else []
        with unless(skip, kept):
            if rounds or (wide and weight.dtype in _HALF):
                weight = self.scratch(weight, torch.float32).copy_(weight)
            yield weight
            if rounds:
                step = int(member.state["step"].item())
                seed = slot.group.get("seed", 0)
                generator = generator_for(seed, *slot.place, step, 1, device=param.device)
                stochastic_round_(param, weight.view(param.shape), generator)
            elif weight.data_ptr() != param.data_ptr():
                # It could not be a view of the parameter, or is wider.
                param.copy_(weight.view(param.shape))
        if apart:
            scatter_(slot.param, param.view(slot.param.shape))

    def _move(
        self, member: Member, weight: Tensor, batch: Batch, i: int, size: float | Tensor
    ) -> Move:
        grad, skip = member.grad, batch.skip
        decay = 1.0 if skip is not None else _decay(batch.group, batch.group["lr"])
        if skip is not None and member.slot.outside is not None:
            clean = self._buffer("clean", grad.device, grad.dtype, grad.numel()).view(grad.shape)
            grad = torch.where(skip, grad.new_zeros(()), grad, out=clean)
        return Move(
            weight=weight,
            grad=grad,
            subspace=member.slot.subspace,
            small=batch.small[i],
            direction=batch.direction[i],
            state=member.state,
            group=batch.group,
            size=size,
            scale=member.slot.scale,
            before=decay if self.decay_first else 1.0,
            after=1.0 if self.decay_first else decay,
            scratch=self.scratch,
            skip=skip,
        )

    def _inside(
        self,
        member: Member,
        weight: Tensor,
        batch: Batch,
        i: int,
        size: float | Tensor,
        lr: float | Tensor,
    ) -> None:
        """``W - size scale up(N)`` and the decay."""
        slot, direction, group = member.slot, batch.direction[i], batch.group
        if isinstance(size, Tensor):
            direction.mul_(size.to(direction.dtype))
            size = 1.0
        beta, apart = 1.0, None
        if batch.skip is not None or isinstance(lr, Tensor):
            apart = _decay_apart(group, lr, batch)
        else:
            beta = _decay(group, lr)
        if apart is not None and self.decay_first:
            weight.mul_(apart)
        alpha = -size * slot.scale * (1.0 if self.decay_first else beta)
        slot.subspace.up(direction, out=weight, alpha=alpha, beta=beta)
        if apart is not None and not self.decay_first:
            weight.mul_(apart)

    def _magnitude_steps(self, members: list[Member], batch: Batch) -> list[Tensor]:
        """What Adam takes off each matrix' magnitudes, ``(m, 1)``."""
        rule = members[0].slot.parts.magnitudes
        assert rule is not None
        radial = [m.radial for m in members if m.radial is not None]
        own = Batch(
            group={**batch.group, "lr": _magnitude_lr(batch.group)},
            age=batch.age,
            small=radial,
            direction=[torch.empty_like(r) for r in radial],
            states=[m.slot.magnitude_state(m.state) for m in members],
            skip=batch.skip,
        )
        size = rule.direction(own)
        sizes = _one_each(size, len(members))
        return [n.mul_(s) for n, s in zip(own.direction, sizes, strict=True)]


def _one_each(size: float | Tensor, count: int) -> list[float | Tensor]:
    return list(size.unbind()) if isinstance(size, Tensor) else [size] * count


def _rounds(slot: Slot) -> bool:
    return slot.param.dtype is torch.bfloat16 and bool(slot.group.get("stochastic_rounding"))


def _magnitude_lr(group: dict[str, Any]) -> Any:
    given = group.get("magnitude_lr")
    return group["lr"] if given is None else given


def _decay(group: dict[str, Any], lr: Any) -> float:
    return 1.0 - float(lr) * group["weight_decay"] if group["weight_decay"] else 1.0


def _decay_apart(group: dict[str, Any], lr: Any, batch: Batch) -> Tensor | None:
    """The decay as a tensor, where the rate or the skip is known to the device only."""
    if not group["weight_decay"]:
        return None
    beta = 1.0 - lr * group["weight_decay"]
    if batch.skip is None:
        return torch.as_tensor(beta)
    like = batch.direction[0]
    return torch.where(batch.skip, torch.ones((), dtype=like.dtype, device=like.device), beta)
