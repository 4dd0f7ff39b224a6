"""The optimizer that all subspace methods share: subspaces, refresh, order of the step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim.batching import device_ages
from fullrank.optim.checks import ranks_of
from fullrank.optim.chunks import Member, chunks
from fullrank.optim.foundation import Entry, FullrankOptimizer, Spec, State
from fullrank.optim.gradients import Verdict
from fullrank.optim.inner import Batch, InnerUpdate
from fullrank.optim.iterative import IterativeSubspace
from fullrank.optim.matrices import (
    Parts,
    Slot,
    announce_unprojected,
    check_ranks,
    make_slot,
    matrix_shape,
)
from fullrank.optim.planned import planned_groups
from fullrank.optim.seeds import generator_for, seed_of
from fullrank.optim.sharded import gathered, is_sharded, local
from fullrank.optim.subspace import MomentPolicy, Subspace
from fullrank.optim.whole import Identity
from fullrank.optim.writing import Writer

_log = logging.getLogger("fullrank.optim")

ProjectionHook = Callable[[Tensor, Tensor, str], Any]


class SubspaceOptimizer(FullrankOptimizer):
    """Runs an inner update in a subspace of each gradient; subclasses choose the parts.

    A subclass says what its groups may hold (``checks``), what a group's matrices are stepped with
    (:meth:`parts`), which subspace they use (:meth:`subspace`), and in which order weights decay.
    A param group with a ``rank`` is projected, one without is not.

    The state of a parameter holds plain tensors: the counters, the moments, and the bases. A basis
    of zeros has not been fitted yet.

    Parameters
    ----------
    params, arguments, nonfinite
        See :class:`FullrankOptimizer`.
    generator
        One of the arguments: seed of what is drawn; a number, or a generator to draw one from.
    plan
        One of the arguments: a plan of purpose ``"optimizer"``, in place of ``rank``; ``params``
        are then named parameters.
    projection_hook
        One of the arguments: ``hook(weight, grad, side)`` is asked at each refresh of an
        ``(m, n)`` matrix and may return the basis to use: ``(r, n)`` for side ``"right"``,
        ``(m, r)`` for ``"left"``, the pair (left, right) for ``"full"``; None leaves the choice
        to the optimizer. It is not saved with the state.

    Warns
    -----
    UserWarning
        When nothing is projected.

    Attributes
    ----------
    refreshes
        How many bases were got by ``"iteration"`` and by ``"decomposition"`` since this object
        was made (those of a hook, and random ones, are not counted). Where iteration from an old
        basis was not good enough, the logger ``fullrank.optim`` says so at level INFO, by name.
    """

    decay_first: ClassVar[bool] = False
    gap_key: ClassVar[str] = "update_proj_gap"

    def __init__(self, params: Iterable[Any], arguments: Mapping[str, Any]) -> None:
        self.projection_hook: ProjectionHook | None = arguments["projection_hook"]
        self.refreshes = {"iteration": 0, "decomposition": 0}
        self._slots: dict[Tensor, Slot] = {}
        self._parts: dict[int, Parts] = {}
        self._writer = Writer(self.decay_first)
        if arguments["plan"] is not None:
            params = planned_groups(params, arguments["plan"], arguments["rank"])
        super().__init__(params, {**arguments, "seed": seed_of(arguments["generator"])})
        self._announce_nothing()

    # -- what a subclass chooses -----------------------------------------------------------

    def parts(self, group: dict[str, Any]) -> Parts:
        """Return what the matrices of a group are stepped with."""
        raise NotImplementedError

    def subspace(self, group: dict[str, Any], rank: int, shape: tuple[int, int]) -> Subspace:
        """Return the (not yet fitted) subspace for an ``(m, n)`` matrix of a group."""
        raise NotImplementedError

    def ranks(self, group: dict[str, Any]) -> list[int | None]:
        """Return one rank for each parameter of a group; None does not project."""
        return ranks_of(group)

    def moment_policy(self, group: dict[str, Any]) -> MomentPolicy:
        """Return what becomes of a group's moments at a refresh."""
        policy: MomentPolicy = group["moments"]
        return policy

    def choose(self, param: Tensor, group: dict[str, Any], place: tuple[int, int]) -> Any:
        """Return the subspace of a parameter: only a rank below both sides saves anything."""
        rank = self.ranks(group)[place[1]]
        if rank is None or param.dim() < 2:
            return Identity()
        shape = matrix_shape(param.shape)
        return self.subspace(group, rank, shape) if rank < min(shape) else Identity()

    # -- groups and state ------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; see :meth:`FullrankOptimizer.add_param_group`.

        Warns
        -----
        UserWarning
            When the group has a rank but holds parameters that are not matrices.
        """
        super().add_param_group(param_group)
        self.forget()
        group = self.param_groups[-1]
        announce_unprojected(group, self.ranks(group))

    def check_group(self, group: dict[str, Any]) -> None:
        """Ranks of a list must be as many as parameters, and none larger than its matrix."""
        check_ranks(group, ranks_of(group))

    def projects(self, param: Tensor) -> bool:
        """Whether a parameter is stepped in a subspace, or partly without state."""
        return self._slot(param).projected

    def _announce_nothing(self) -> None:
        if not any(self.projects(p) for group in self.param_groups for p in group["params"]):
            warnings.warn(
                f"{type(self).__name__} projects nothing: no group has a rank below the sides of "
                "its matrices; give rank=, plan=, or param_groups(model, ...)",
                stacklevel=4,
            )

    def _slot(self, param: Tensor) -> Slot:
        slot = self._slots.get(param)
        if slot is None:
            place = self.place_of(param)
            group = self.param_groups[place[0]]
            space = self.choose(param, group, place)
            slot = make_slot(param, group, place, self.parts(group), space)
            self._slots[param] = slot
        return slot

    def _parts_of(self, group: int) -> Parts:
        if group not in self._parts:
            self._parts[group] = self.parts(self.param_groups[group])
        return self._parts[group]

    def state_spec(self, param: Tensor, group: dict[str, Any]) -> Spec:
        """Shape and dtype of the moments and the bases."""
        if not self.state.get(param):
            self._slots.pop(param, None)  # the group, or the weight's dtype, may have changed
        slot = self._slot(param)
        # A schedule may have changed what the group says since the slot was made.
        slot.parts = self.parts(group)
        return slot.expected()

    def fill(self, param: Tensor, group: dict[str, Any], state: State) -> None:
        """New state has no basis."""
        self._slot(param).fill(state)

    def home(self, name: str, param: Tensor) -> torch.device:
        """Seeds are for the host."""
        return torch.device("cpu") if name == "seed" else super().home(name, param)

    def forget(self) -> None:
        """Drop the slots."""
        super().forget()
        self._slots.clear()
        self._parts.clear()

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = {
            "projection_hook": self.projection_hook,
            "refreshes": dict(self.refreshes),
            "_slots": {},
            "_parts": {},
            "_writer": Writer(self.decay_first),
        }
        return {**super().__getstate__(), **kept}

    # -- the step --------------------------------------------------------------------------

    def due(self, entry: Entry) -> bool:
        """Whether this matrix gets a new subspace by the schedule, or has none."""
        slot = self._slot(entry.param)
        if not slot.attached:
            slot.attach(entry.state)
        return slot.projected and (
            not slot.subspace.fitted
            or int(entry.state["step"].item()) % entry.group[self.gap_key] == 0
        )

    def advance(self, entries: list[Entry], verdict: Verdict) -> None:
        """Refresh what is due, and step matrices of a kind together."""
        # What a group says may have changed since the last step.
        self._parts.clear()
        # A chunk goes by its first member: one without elements cannot speak for the others.
        members = [self._member(entry) for entry in entries if entry.param.numel()]
        for age, chunk in chunks(members, self._device_knows):
            self._advance(chunk, age, verdict)
        self._writer.trim()

    def _member(self, entry: Entry) -> Member:
        slot = self._slot(entry.param)
        slot.parts = self._parts_of(entry.place[0])
        member = self._seen(slot, entry)
        if entry.due and slot.projected:
            # A gradient of zeros has no subspace to give.
            if self.projection_hook is not None:
                side = slot.subspace.side
                member.given = self.projection_hook(member.weight, member.grad, side)
            member.due = entry.usable or member.given is not None
            resets = slot.subspace.fitted and self.moment_policy(slot.group) == "reset"
            member.restarts = member.due and resets
        return member

    @staticmethod
    def _seen(slot: Slot, entry: Entry) -> Member:
        """The weight as a matrix; of a sharded one its local part, or all of it."""
        if not is_sharded(entry.param):
            weight, grad = slot.matrix(entry.param), slot.matrix(entry.grad)
            return Member(slot, weight, grad, entry.state)
        if slot.spreads:
            state = {name: local(value) for name, value in entry.state.items()}
            return Member(slot, local(entry.param), local(entry.grad), state)
        whole = gathered(entry.param)
        return Member(slot, slot.matrix(whole), slot.matrix(gathered(entry.grad)), entry.state)

    def spreads(self, param: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a state tensor is spread as its parameter: where all that is kept can be."""
        return is_sharded(param) and shape == tuple(param.shape) and self._slot(param).spreads

    def _advance(self, members: list[Member], age: float | None, verdict: Verdict) -> None:
        first, writer = members[0].slot, self._writer
        # What subspaces are fitted to must not be overwritten by the next one's.
        own = isinstance(first.subspace, Identity)
        grads = {
            i: writer.gradient(m, keep=True)
            for i, m in enumerate(members)
            if m.due or (own and first.reparam is not None)
        }
        self._refresh([(m, grads[i]) for i, m in enumerate(members) if m.due])
        batch = Batch(
            group=first.group,
            age=device_ages([m.state for m in members]) if age is None else age,
            weights=[m.weight for m in members],
            states=[m.state for m in members],
            skip=verdict.skip.get(members[0].weight.device),
        )
        if own and first.reparam is None:
            batch.small = [m.grad for m in members]
            if writer.dense(batch, first):
                return
        batch.small = [
            self._down(m, grads[i] if i in grads else writer.gradient(m), out)
            for i, (m, out) in enumerate(
                zip(members, writer.small_arrays(members, "small"), strict=True)
            )
        ]
        batch.direction = writer.small_arrays(members, "direction")
        size: float | Tensor = (
            first.inner.direction(batch) if first.small_size else float(first.group["lr"])
        )
        writer.write(members, batch, size)

    @staticmethod
    def _down(member: Member, grad: Tensor, out: Tensor) -> Tensor:
        space = member.slot.subspace
        if isinstance(space, Identity) and grad.dtype == out.dtype and grad.is_contiguous():
            return grad
        small: Tensor = space.down(grad, out=out)
        return small

    # -- refreshing ------------------------------------------------------------------------

    def _refresh(self, each: list[tuple[Member, Tensor]]) -> None:
        for member, _ in each:
            if member.given is not None:
                self._adopt(member, self._injected(member))
        chosen = [(m, grad) for m, grad in each if m.given is None]
        fitted = self._fit(chosen)
        fell_back = []
        for (member, _), new in zip(chosen, fitted, strict=True):
            iterates = isinstance(new, IterativeSubspace)
            iterated = iterates and new.steps > 0
            if member.slot.subspace.fitted:
                new.align(member.slot.subspace)
                if iterates and not iterated:
                    fell_back.append(self._name(*member.slot.place))
            if not new.draws:
                self.refreshes["iteration" if iterated else "decomposition"] += 1
            self._adopt(member, new)
        if fell_back:
            _log.info(
                "%d of %d bases were decomposed anew, where iteration would have kept too little "
                "of the gradient's energy: %s",
                len(fell_back),
                len(chosen),
                "; ".join(fell_back),
            )

    def _injected(self, member: Member) -> Subspace:
        given = member.given if isinstance(member.given, tuple) else (member.given,)
        slot = member.slot
        try:
            found: Subspace = slot.subspace.inject(given, member.weight)
        except InputError as error:
            raise InputError(f"projection_hook, {self._name(*slot.place)}: {error}") from None
        return found

    def _fit(self, members: list[tuple[Member, Tensor]]) -> list[Any]:
        # Bases of zeros, which a state is allocated with, are no start for an iteration.
        spaces = [
            m.slot.subspace if m.slot.subspace.fitted else m.slot.subspace.restore({})
            for m, _ in members
        ]
        if all(isinstance(space, IterativeSubspace) for space in spaces):
            return list(IterativeSubspace.fit_many(spaces, [grad for _, grad in members]))
        return [
            space.fit(m.weight, grad, self._generator(m) if space.draws else None)
            for space, (m, grad) in zip(spaces, members, strict=True)
        ]

    @staticmethod
    def _generator(member: Member) -> torch.Generator:
        slot = member.slot
        step = int(member.state["step"].item())
        return generator_for(slot.group.get("seed", 0), *slot.place, step)

    def _adopt(self, member: Member, new: Subspace) -> None:
        slot, state = member.slot, member.state
        policy, old = self.moment_policy(slot.group), slot.subspace
        if old.fitted and policy == "reset":
            self.reset_moments(slot, state)
        elif old.fitted and policy == "rotate":
            slot.inner.on_first_moment(state, lambda m: new.transport(old, [m], "rotate"))
        state.update(new.state)
        slot.subspace = new

    @staticmethod
    def reset_moments(slot: Slot, state: State) -> None:
        """Start the moments over, and their bias correction with them."""
        slot.inner.reset(state)
        magnitudes: InnerUpdate | None = slot.parts.magnitudes
        if slot.reparam is not None and magnitudes is not None:
            magnitudes.reset(slot.magnitude_state(state))
        state["unseen"].copy_(state["step"] - 1.0)
