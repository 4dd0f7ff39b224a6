"""What every optimizer of the package shares: groups, names, state, resume, bad gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from fullrank.core.errors import InputError
from fullrank.optim.checks import Check, check_group, one_of, plain
from fullrank.optim.gradients import NonFinite, Verdict, check_dense, host_decides, judge, norms
from fullrank.optim.resume import check_kept, made_for, restored
from fullrank.optim.sharded import is_sharded, local, zeros

State = dict[str, Any]
Spec = dict[str, tuple[tuple[int, ...], torch.dtype]]

COUNTERS: Spec = {"step": ((), torch.float32), "unseen": ((), torch.float32)}
"""What the state of every parameter holds."""


@dataclass(slots=True)
class Entry:
    """One parameter with a gradient in one step.

    Attributes
    ----------
    param, grad
        The parameter and its gradient.
    group, place
        Its param group, and (group's index, index in the group).
    state
        Its state; ``step`` counts this step already.
    due
        Whether something is about to be fitted to the gradient, which must be looked at first.
    usable
        Whether the gradient is finite and not all zero; only looked at where ``due``.
    norms
        What :meth:`FullrankOptimizer.norms` worked out of the gradient beside its norm.
    alone
        Whether it is stepped without the others, in the backward pass.
    """

    param: Tensor
    grad: Tensor
    group: dict[str, Any]
    place: tuple[int, int]
    state: State
    due: bool = False
    usable: bool = True
    norms: Tensor | None = None
    alone: bool = False


def own_part(entry: Entry) -> Entry:
    """Return what this process holds of a parameter that is spread; a whole one as it is."""
    if not is_sharded(entry.param):
        return entry
    state = {name: local(value) for name, value in entry.state.items()}
    return replace(entry, param=local(entry.param), grad=local(entry.grad), state=state)


class FullrankOptimizer(Optimizer):
    """Groups with checks, a state of plain tensors, resume bit for bit, bad gradients.

    A subclass says what its groups may hold (``checks``), which tensors it keeps for a parameter
    (:meth:`state_spec`) and what a step does (:meth:`advance`). Besides these tensors every
    parameter has two counters: ``step``, the calls that brought it a gradient, on the CPU, and
    ``unseen``, how many of these its moments have not seen (skipped, or before a reset).

    Parameters
    ----------
    params
        Parameters, named parameters or param groups.
    arguments
        The subclass's own arguments by name, for which its ``locals()`` will do. Those that
        ``checks`` names are the values of groups that do not give their own.
    nonfinite
        One of the arguments: what a NaN or an infinity in any gradient does. ``"skip"``
        (default): the whole step is left out, moments and weights stay as they are; decided on
        the device, without waiting for it. ``"raise"``: :class:`~fullrank.core.InputError` before
        anything changes; reads one flag from the device each step. ``"ignore"``: gradients are
        not looked at.

    Raises
    ------
    InputError
        On a value that a group cannot have, or a complex or integer parameter.
    """

    checks: ClassVar[Mapping[str, Check]] = {}
    separable: ClassVar[bool] = True
    """Whether a parameter can be stepped without the others."""
    planned: ClassVar[tuple[str, ...]] = ()
    """Keys of a group that a plan's options may give, one value a parameter."""

    def __init__(self, params: Iterable[Any], arguments: Mapping[str, Any]) -> None:
        one_of("skip", "raise", "ignore")("nonfinite", arguments["nonfinite"])
        self.nonfinite: NonFinite = arguments["nonfinite"]
        self._places: dict[Tensor, tuple[int, int]] = {}
        # What each group said, and its weights were, when its state was last looked at.
        self._settled: dict[int, tuple[dict[str, Any], list[Any]]] = {}
        defaults = {name: plain(arguments[name]) for name in self.checks}
        check_group(defaults, self.checks)
        super().__init__(params, defaults)

    # -- what a subclass says --------------------------------------------------------------

    def state_spec(self, param: Tensor, group: dict[str, Any]) -> Spec:
        """Shape and dtype of each tensor kept for a parameter, beside the counters."""
        raise NotImplementedError

    def advance(self, entries: list[Entry], verdict: Verdict) -> None:
        """Change weights and state; gradients are dense, and neither is skipped by the host.

        ``verdict.skip`` may hold a flag a device that only the device knows: where it is True,
        nothing may change but the counters. :func:`unless` sees to that.
        """
        raise NotImplementedError

    def fill(self, param: Tensor, group: dict[str, Any], state: State) -> None:
        """Give new state, allocated as zeros, its first values. Nothing by default."""

    def due(self, entry: Entry) -> bool:
        """Whether something is about to be fitted to this gradient; the counters are not up yet."""
        return False

    def count(self, entries: list[Entry]) -> None:
        """Count a step, which may yet be skipped."""
        torch._foreach_add_([entry.state["step"] for entry in entries], 1.0)

    def norms(self, entries: Sequence[Entry]) -> Sequence[Tensor]:
        """Return the Euclidean norm of each gradient, each finite exactly when that is."""
        return norms([entry.grad for entry in entries])

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise :class:`InputError` on a group whose values do not go together."""

    def projects(self, param: Tensor) -> bool:
        """Whether a parameter's state is smaller than the weight; for the memory table."""
        return False

    # -- groups ----------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as :meth:`torch.optim.Optimizer.add_param_group`; the dict is not changed.

        Raises
        ------
        InputError
            On a value that the group cannot have, or a complex or integer parameter.
        """
        group = {n: plain(v) if n in self.checks else v for n, v in param_group.items()}
        if not isinstance(group["params"], Tensor | set):
            group["params"] = list(group["params"])
        check_group({**self.defaults, **group}, self.checks)
        super().add_param_group(group)
        self._places.clear()
        try:
            self.check_group(group)
            for i, param in enumerate(group["params"]):
                check_parameter(self._name(len(self.param_groups) - 1, i), param)
        except InputError:
            self.param_groups.pop()
            raise

    def name_of(self, param: Tensor) -> str:
        """Return what to call a parameter in a message."""
        return self._name(*self.place_of(param))

    def place_of(self, param: Tensor) -> tuple[int, int]:
        """Return (group's index, index in the group) of a parameter."""
        if not self._places:
            self._places = {
                each: (g, i)
                for g, group in enumerate(self.param_groups)
                for i, each in enumerate(group["params"])
            }
        return self._places[param]

    def _name(self, group: int, index: int) -> str:
        names = self.param_groups[group].get("param_names")
        shape = tuple(self.param_groups[group]["params"][index].shape)
        where = repr(names[index]) if names else f"{index} of group {group}"
        return f"parameter {where} of shape {shape}"

    # -- state -----------------------------------------------------------------------------

    def expected_state(self, param: Tensor) -> Spec:
        """Shape and dtype of each state tensor of a parameter, without allocating any."""
        group = self.param_groups[self.place_of(param)[0]]
        return {**COUNTERS, **self.state_spec(param, group)}

    def state_of(self, param: Tensor, group: dict[str, Any]) -> State:
        """Return the state of a parameter, made where it is not there yet."""
        state: State = self.state[param]
        if "step" not in state:
            for name, (shape, dtype) in self.expected_state(param).items():
                state[name] = self.zeros(name, shape, dtype, param)
            self.fill(param, group, state)
        return state

    def zeros(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, param: Tensor) -> Tensor:
        """Allocate a state tensor."""
        if self.spreads(param, shape, dtype):
            return zeros(shape, dtype, param)
        return torch.zeros(shape, dtype=dtype, device=self.home(name, param))

    def spreads(self, param: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a state tensor is spread over processes as its sharded parameter is."""
        return is_sharded(param) and shape == tuple(param.shape) and dtype.is_floating_point

    def home(self, name: str, param: Tensor) -> torch.device:
        """Return the device that a state tensor of this name lives on."""
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
            self.forget()

    def forget(self) -> None:
        """Drop what was derived from groups and state; it is made anew where needed."""
        self._places.clear()

    def _restore(self, saved: dict[str, Any]) -> None:
        self.forget()
        for g, group in enumerate(self.param_groups):
            lacking = [name for name in self.checks if name not in group]
            if lacking:
                raise InputError(
                    f"this is the state of another optimizer: its group {g} lacks {lacking[0]!r}, "
                    f"which {type(self).__name__} needs"
                )
            check_group(group, self.checks)
        self.state.update(
            restored(self.param_groups, saved, self.saved_spec, self.home, self.spreads, self._name)
        )

    def saved_spec(self, param: Tensor, saved: Mapping[str, Any]) -> Spec:
        """Return what a saved state of a parameter must hold: by default, what it will hold."""
        return self.expected_state(param)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # One that was pickled before there was this.
        super().__setstate__({"_settled": {}, **state})

    def __getstate__(self) -> dict[str, Any]:
        kept: dict[str, Any] = {"nonfinite": self.nonfinite, "_places": {}, "_settled": {}}
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
        for g, group in enumerate(self.param_groups):
            self._settle(g, range(len(group["params"])))
        entries = list(self._entries())
        if entries:
            self._take(entries)
        return loss

    @torch.no_grad()
    def step_parameter(self, param: Tensor) -> None:
        """Step one parameter alone, by its gradient; see :func:`step_per_layer`."""
        g, i = self.place_of(param)
        self._settle(g, [i])
        entry = self._entry(g, i, param)
        entry.alone = True
        self._take([entry])

    def _settle(self, g: int, about_to_step: Iterable[int]) -> None:
        """See that the state there is is what a group, and its weights, still ask for."""
        group = self.param_groups[g]
        params, now = group["params"], made_for(group, self.checks)
        before, weights = self._settled.get(g, ({}, []))
        same = now == before and len(weights) == len(params)
        if same and all(weights[i] == _kind(params[i]) for i in about_to_step):
            return
        if before:
            self.forget()
        try:
            for i, param in enumerate(params):
                if state := self.state.get(param):
                    spec = self.saved_spec(param, state)
                    check_kept(state, spec, self._name(g, i), before, now)
        except InputError:
            self.forget()  # what was derived from what the group says now
            raise
        self._settled[g] = now, [_kind(param) for param in params]

    def _entries(self) -> Iterator[Entry]:
        for g, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param.grad is not None:
                    yield self._entry(g, i, param)

    def _entry(self, g: int, i: int, param: Tensor) -> Entry:
        grad, group = param.grad, self.param_groups[g]
        assert grad is not None
        check_dense(grad, lambda: self._name(g, i))
        return Entry(param, grad, group, (g, i), self.state_of(param, group))

    def _take(self, entries: list[Entry]) -> None:
        for entry in entries:
            entry.due = self.due(entry)
        verdict = judge(
            [e.grad for e in entries],
            [e.due for e in entries],
            self.nonfinite,
            lambda i: self._name(*entries[i].place),
            lambda _: self.norms(entries),
        )
        self.count(entries)
        if verdict.skip_all:
            torch._foreach_add_([e.state["unseen"] for e in entries], 1.0)
            return
        for entry, usable in zip(entries, verdict.usable, strict=True):
            entry.usable = usable
        for device, skip in verdict.skip.items():
            unseen = [e.state["unseen"] for e in entries if e.param.device == device]
            torch._foreach_add_(unseen, [skip.to(unseen[0].dtype)] * len(unseen))
        self.advance(entries, verdict)


def _kind(param: Tensor) -> tuple[torch.Size, torch.dtype]:
    return param.shape, param.dtype


@contextmanager
def unless(skip: Tensor | None, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Undo what the block does to these tensors where ``skip`` is True, without reading it.

    With ``skip=None`` it costs nothing; otherwise one copy of the tensors while the block runs.

    >>> weight = torch.ones(2)
    >>> with unless(torch.tensor(True), [weight]):
    ...     _ = weight.zero_()
    >>> weight
    tensor([1., 1.])
    """
    before = [] if skip is None else [tensor.clone() for tensor in tensors]
    yield
    if skip is not None:
        for tensor, old in zip(tensors, before, strict=True):
            tensor.copy_(torch.where(skip, old, tensor))


def check_parameter(name: str, param: Tensor) -> None:
    """Only real floating-point weights can be stepped."""
    if param.is_complex() or not param.is_floating_point():
        raise InputError(
            f"{name} is of {param.dtype}; only real floating-point weights are stepped"
        )
