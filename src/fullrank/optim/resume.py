"""Reading a saved optimizer state, with every tensor in the dtype it has at work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.optim.sharded import gathered, spread

Spec = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
Home = Callable[[str, Tensor], torch.device]
Spreads = Callable[[Tensor, tuple[int, ...], torch.dtype], bool]


def restored(
    param_groups: list[dict[str, Any]],
    saved: Mapping[str, Any],
    expected: Callable[[Tensor, Mapping[str, Any]], Spec],
    home: Home,
    spreads: Spreads,
    name: Callable[[int, int], str],
) -> dict[Tensor, dict[str, Tensor]]:
    """State of each parameter, as copies of what was saved.

    Parameters
    ----------
    param_groups
        The optimizer's groups; their parameters are matched with the saved ones by order.
    saved
        A ``state_dict``.
    expected
        (parameter, what was saved for it) -> what it must hold.
    home
        (state tensor's name, parameter) -> device it lives on.
    spreads
        (parameter, shape, dtype) -> whether such a tensor is spread as its sharded parameter is.
    name
        (group, index) -> what to call the parameter in a message.

    Raises
    ------
    InputError
        When a parameter's state lacks a tensor, has a foreign one, or one of another shape.
    """
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    places = [(g, i) for g, group in enumerate(param_groups) for i in range(len(group["params"]))]
    found = {}
    for key, (g, i) in zip(ids, places, strict=True):
        state = saved["state"].get(key)
        if not state:
            continue
        param = param_groups[g]["params"][i]
        spec = expected(param, state)
        check_state(state, spec, name(g, i))
        found[param] = {
            n: (
                spread(state[n].detach(), param).to(dtype=dtype, copy=True)
                if spreads(param, shape, dtype)
                else gathered(state[n].detach()).to(home(n, param), dtype, copy=True)
            )
            for n, (shape, dtype) in spec.items()
        }
    return found


# What schedules change, and no tensor's shape depends on.
_SCHEDULED = frozenset({"lr", "betas", "eps", "weight_decay"})


def made_for(group: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """What a group says that its parameters' state may depend on, to compare with later."""
    said = {key: group[key] for key in keys if key in group and key not in _SCHEDULED}
    if "momentum" in said:
        said["momentum"] = bool(said["momentum"])  # that there is one, that is
    return {key: list(v) if isinstance(v, list) else v for key, v in said.items()}


def check_kept(
    state: Mapping[str, Any], spec: Spec, name: str, before: Mapping[str, Any], now: Any
) -> None:
    """Raise :class:`InputError` when a state in use is not what its group asks for."""
    kept = {key: (tuple(value.shape), value.dtype) for key, value in state.items()}
    if kept == spec:
        return
    changed = [key for key in now if before and before.get(key) != now[key]]
    what = next(key for key in (*spec, *kept) if kept.get(key) != spec.get(key))
    why = ", ".join(changed) or "what it depends on, such as the weight,"
    raise InputError(
        f"{name} has the state {what}: {kept.get(what, 'none')}, but its group now asks for "
        f"{spec.get(what, 'none')}: {why} cannot change once there is state. Set it back, or make "
        "a new optimizer"
    )


def check_state(state: Mapping[str, Any], spec: Spec, name: str) -> None:
    """Raise :class:`InputError` unless a saved state has the tensors that are expected."""
    if set(state) != set(spec):
        raise InputError(
            f"the saved state of {name} holds {sorted(state)}, but this optimizer keeps "
            f"{sorted(spec)}: was it saved by another optimizer, or with another state_bits?"
        )
    for key, (shape, dtype) in spec.items():
        value = state[key]
        if not isinstance(value, Tensor) or tuple(value.shape) != shape:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"the saved {key} of {name} is {got}, expected {shape}: "
                "the model or its param groups have changed since it was saved"
            )
        if value.is_floating_point() != dtype.is_floating_point:
            raise InputError(f"the saved {key} of {name} is of {value.dtype}, expected {dtype}")
