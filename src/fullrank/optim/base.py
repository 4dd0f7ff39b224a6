"""The optimizer that all subspace methods share: groups, state, refresh, order of the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fullrank.core.errors import InputError
from fullrank.optim.checks import Check, check_group, one_of, ranks_of
from fullrank.optim.chunks import Member, chunks, device_ages
from fullrank.optim.gradients import NonFinite, Verdict, host_decides, judge
from fullrank.optim.inner import Batch, InnerUpdate, State
from fullrank.optim.iterative import IterativeSubspace
from fullrank.optim.matrices import Slot, announce_unprojected, check_parameter, make_slot
from fullrank.optim.resume import restored
from fullrank.optim.subspace import Projection

ProjectionHook = Callable[[Tensor, Tensor, str], Tensor | tuple[Tensor, Tensor] | None]
Expected = dict[str, tuple[tuple[int, ...], torch.dtype]]


class SubspaceOptimizer(Optimizer):
    """Runs an inner update in a subspace of each gradient; subclasses choose the parts.

    A subclass says what its groups may hold (``checks``), which inner update and which subspace
    a group uses (:meth:`inner`, :meth:`subspace`), and in which order weights decay. A param
    group with a ``rank`` is projected, one without is not.

    Every tensor of the state is a plain tensor: ``step`` (calls that brought a gradient, on the
    CPU), ``unseen`` (how many of these the moments have not seen: skipped, or before a reset),
    the moments, and the bases. A basis of zeros has not been fitted yet.

    Parameters
    ----------
    params
        Parameters, named parameters or param groups.
    defaults
        Values for groups that do not give their own.
    nonfinite
        What a NaN or an infinity in any gradient does. ``"skip"`` (default): the whole step is
        left out, moments and weights stay as they are; decided on the device, without waiting
        for it. ``"raise"``: :class:`~fullrank.core.InputError` before anything changes; reads
        one flag from the device each step. ``"ignore"``: gradients are not looked at.
    projection_hook
        ``hook(weight, grad, side)`` is asked at each refresh of an ``(m, n)`` matrix and may
        return the basis to use: ``(r, n)`` for side ``"right"``, ``(m, r)`` for ``"left"``, the
        pair (left, right) for ``"full"``; None leaves the choice to the optimizer. It is not
        saved with the state.

    Attributes
    ----------
    refreshes
        How many bases were got by ``"iteration"`` and by ``"decomposition"`` since this object
        was made (those of a hook are not counted).
    """

    checks: ClassVar[Mapping[str, Check]] = {}
    decay_first: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        nonfinite: NonFinite = "skip",
        projection_hook: ProjectionHook | None = None,
    ) -> None:
        one_of("skip", "raise", "ignore")("nonfinite", nonfinite)
        self.nonfinite: NonFinite = nonfinite
        self.projection_hook = projection_hook
        self.refreshes = {"iteration": 0, "decomposition": 0}
        self._slots: dict[Tensor, Slot] = {}
        check_group(defaults, self.checks)
        super().__init__(params, defaults)

    # -- what a subclass chooses -----------------------------------------------------------

    def inner(self, group: dict[str, Any]) -> InnerUpdate:
        """Return the inner update of a group."""
        raise NotImplementedError

    def subspace(self, group: dict[str, Any], rank: int, shape: tuple[int, int]) -> Projection:
        """Return the (not yet fitted) subspace for an ``(m, n)`` matrix of a group."""
        raise NotImplementedError

    # -- groups ----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group`; the dict is not changed.

        Raises
        ------
        InputError
            On a value that the group cannot have, or a complex or integer parameter.

        Warns
        -----
        UserWarning
            When the group has a rank but holds parameters that are not matrices.
        """
        group = dict(param_group)
        if not isinstance(group["params"], Tensor | set):
            group["params"] = list(group["params"])
        check_group({**self.defaults, **group}, self.checks)
        super().add_param_group(group)
        try:
            ranks = ranks_of(group)
            for i, param in enumerate(group["params"]):
                check_parameter(self._name(len(self.param_groups) - 1, i), param)
        except InputError:
            self.param_groups.pop()
            raise
        announce_unprojected(group, ranks)
        self._slots.clear()

    def _name(self, group: int, index: int) -> str:
        names = self.param_groups[group].get("param_names")
        shape = tuple(self.param_groups[group]["params"][index].shape)
        where = repr(names[index]) if names else f"{index} of group {group}"
        return f"parameter {where} of shape {shape}"

    def _slot(self, param: Tensor) -> Slot:
        if not self._slots:
            self._slots = {
                param: make_slot(param, group, rank, (g, i), self.inner(group), self.subspace)
                for g, group in enumerate(self.param_groups)
                for i, (param, rank) in enumerate(
                    zip(group["params"], ranks_of(group), strict=True)
                )
            }
        return self._slots[param]

    # -- state -----------------------------------------------------------------------------

    def expected_state(self, param: Tensor) -> Expected:
        """Shape and dtype of each state tensor of a parameter, without allocating any."""
        slot = self._slot(param)
        scalar = ((), torch.float32)
        return {"step": scalar, "unseen": scalar, **slot.expected()}

    def _state(self, slot: Slot) -> State:
        state: State = self.state[slot.param]
        if "step" not in state:
            for name, (shape, dtype) in self.expected_state(slot.param).items():
                state[name] = torch.zeros(shape, dtype=dtype, device=self._home(name, slot.param))
            slot.attached = False
        if not slot.attached:
            slot.attach(state)
        return state

    def _home(self, name: str, param: Tensor) -> torch.device:
        # Who decides about a skip holds the count of skips.
        on_host = name == "step" or (name == "unseen" and not self._device_knows(param))
        return torch.device("cpu") if on_host else param.device

    def _device_knows(self, param: Tensor) -> bool:
        """Whether only the device knows which steps were skipped."""
        return self.nonfinite == "skip" and not host_decides(param.device)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, bit for bit.

        Every tensor keeps the dtype it was saved in (torch would cast it to the weight's).

        Raises
        ------
        InputError
            When the state belongs to another optimizer, or to parameters of other shapes.
        """
        before = self.state, self.param_groups
        seen: dict[str, Any] = {}

        # Last of the hooks before, it sees what they made of the state; torch then casts nothing.
        def take(_: Optimizer, final: dict[str, Any]) -> dict[str, Any]:
            seen.update(final)
            return {**final, "state": {}}

        # First of the hooks after, so that the others find the state in place.
        handles = (
            self.register_load_state_dict_pre_hook(take),
            self.register_load_state_dict_post_hook(lambda _: self._restore(seen), prepend=True),
        )
        try:
            super().load_state_dict(state_dict)
        except BaseException:
            self.state, self.param_groups = before
            raise
        finally:
            for handle in handles:
                handle.remove()
            self._slots.clear()

    def _restore(self, saved: dict[str, Any]) -> None:
        self._slots.clear()
        for g, group in enumerate(self.param_groups):
            lacking = [name for name in self.checks if name not in group]
            if lacking:
                raise InputError(
                    f"this is the state of another optimizer: its group {g} lacks {lacking[0]!r}, "
                    f"which {type(self).__name__} needs"
                )
            check_group(group, self.checks)
        self.state.update(
            restored(self.param_groups, saved, self.expected_state, self._home, self._name)
        )

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = {
            "nonfinite": self.nonfinite,
            "projection_hook": self.projection_hook,
            "refreshes": dict(self.refreshes),
            "_slots": {},
        }
        return {**super().__getstate__(), **kept}

    # -- the step --------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step.

        Parameters
        ----------
        closure
            Evaluates the model again and returns the loss.

        Returns
        -------
        float or None
            The closure's loss.

        Raises
        ------
        InputError
            On a sparse gradient; on one that is not finite with ``nonfinite="raise"``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        members = list(self._members())
        if not members:
            return loss
        grads, due = [m.grad for m in members], [m.due for m in members]
        verdict = judge(grads, due, self.nonfinite, lambda i: self._name(*members[i].slot.place))
        torch._foreach_add_([m.state["step"] for m in members], 1.0)
        if verdict.skip_all:
            torch._foreach_add_([m.state["unseen"] for m in members], 1.0)
            return loss
        for member, usable in zip(members, verdict.usable, strict=True):
            self._prepare(member, usable)
            if verdict.skip:
                member.state["unseen"].add_(verdict.skip[member.weight.device])
        for age, chunk in chunks(members, self._device_knows):
            self._advance(chunk, age, verdict)
        return loss

    def _members(self) -> Iterator[Member]:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                slot = self._slot(param)
                if param.grad.layout != torch.strided:
                    raise InputError(
                        f"{self._name(*slot.place)} has a sparse gradient; use a dense one "
                        "(sparse=False in nn.Embedding) or torch.optim.SparseAdam for it"
                    )
                state = self._state(slot)
                due = slot.projected and (
                    not slot.fitted or int(state["step"].item()) % group["update_proj_gap"] == 0
                )
                yield Member(slot, slot.matrix(param), slot.matrix(param.grad), state, due)

    def _prepare(self, member: Member, usable: bool) -> None:
        """Decide whether a matrix gets a new subspace: a gradient of zeros has none to give."""
        if member.due and self.projection_hook is not None:
            side = member.slot.subspace.side
            member.given = self.projection_hook(member.weight, member.grad, side)
        member.due = member.due and (usable or member.given is not None)

    def _advance(self, members: list[Member], age: float | None, verdict: Verdict) -> None:
        self._refresh([m for m in members if m.due])
        first = members[0]
        batch = Batch(
            group=first.slot.group,
            age=device_ages(members) if age is None else age,
            weights=[m.weight for m in members],
            states=[m.state for m in members],
            skip=verdict.skip.get(first.weight.device),
        )
        if not first.slot.projected:
            batch.small = [m.grad for m in members]
            if batch.skip is None and self._dense(batch, first.slot.inner):
                return
        dtype = first.slot.moments_dtype
        batch.small = [m.slot.subspace.down(m.grad).to(dtype).contiguous() for m in members]
        batch.direction = [torch.empty_like(small) for small in batch.small]
        self.apply(members, batch, first.slot.inner.direction(batch))
        for member in members:
            member.slot.write_back(member.weight)

    def apply(self, members: list[Member], batch: Batch, size: float | Tensor) -> None:
        """Write ``W - size * scale * up(direction)`` and the decay; override for an outside rule.

        Parameters
        ----------
        members
            The matrices.
        batch
            What the inner update has worked on; ``batch.direction`` is at hand to be changed.
        size
            The inner update's step size; a tensor holds one a matrix.
        """
        group = batch.group
        scale = float(group["scale"]) if members[0].slot.projected else 1.0
        if isinstance(size, Tensor):
            torch._foreach_mul_(batch.direction, list(size.to(batch.direction[0].dtype)))
            size = 1.0
        rates = batch.lr if batch.lr is not None else [group["lr"]] * len(members)
        for member, direction, lr in zip(members, batch.direction, rates, strict=True):
            beta, apart = 1.0, None
            if batch.skip is not None or isinstance(lr, Tensor):
                apart = self._decay_apart(group, lr, batch)
            else:
                beta = self._decay(group, lr)
            if apart is not None and self.decay_first:
                member.weight.mul_(apart)
            alpha = -size * scale * (1.0 if self.decay_first else beta)
            member.slot.subspace.up(direction, out=member.weight, alpha=alpha, beta=beta)
            if apart is not None and not self.decay_first:
                member.weight.mul_(apart)

    def _dense(self, batch: Batch, inner: InnerUpdate) -> bool:
        if batch.group["lr"] is None:
            return False
        beta = self._decay(batch.group, batch.group["lr"])
        return inner.dense(batch, alpha=1.0 if self.decay_first else beta, beta=beta)

    @staticmethod
    def _decay(group: dict[str, Any], lr: Any) -> float:
        return 1.0 - float(lr) * group["weight_decay"] if group["weight_decay"] else 1.0

    @staticmethod
    def _decay_apart(group: dict[str, Any], lr: Any, batch: Batch) -> Tensor | None:
        """The decay as a tensor, where the rate or the skip is known to the device only."""
        if not group["weight_decay"]:
            return None
        beta = 1.0 - lr * group["weight_decay"]
        if batch.skip is None:
            return torch.as_tensor(beta)
        like = batch.direction[0]
        return torch.where(batch.skip, torch.ones((), dtype=like.dtype, device=like.device), beta)

    # -- refreshing ------------------------------------------------------------------------

    def _refresh(self, members: list[Member]) -> None:
        chosen = [m for m in members if m.given is None]
        for member in members:
            if member.given is not None:
                slot = member.slot
                self._adopt(member, slot.injected(member.given, self._name(*slot.place)))
        fitted = self._fit(chosen)
        for member, new in zip(chosen, fitted, strict=True):
            if member.slot.fitted:
                new.align(member.slot.subspace)
            iterated = isinstance(new, IterativeSubspace) and new.steps > 0
            self.refreshes["iteration" if iterated else "decomposition"] += 1
            self._adopt(member, new)

    @staticmethod
    def _fit(members: list[Member]) -> list[Projection]:
        # Bases of zeros, which a state is allocated with, are no start for an iteration.
        subspaces = [
            m.slot.subspace if m.slot.fitted else m.slot.subspace.restore({}) for m in members
        ]
        if all(isinstance(subspace, IterativeSubspace) for subspace in subspaces):
            return list(IterativeSubspace.fit_many(subspaces, [m.grad for m in members]))
        return [s.fit(m.weight, m.grad) for s, m in zip(subspaces, members, strict=True)]

    def _adopt(self, member: Member, new: Projection) -> None:
        slot, state = member.slot, member.state
        policy, old = slot.group["moments"], slot.subspace
        if slot.fitted and policy == "reset":
            slot.inner.reset(state)
            # The moments start over, and their bias correction with them.
            state["unseen"].copy_(state["step"] - 1.0)
        elif slot.fitted and policy == "rotate":
            slot.inner.on_first_moment(state, lambda m: new.transport(old, [m], "rotate"))
        state.update(new.state)
        slot.subspace, slot.fitted = new, True
