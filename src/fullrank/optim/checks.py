"""What a param group may say, and what to answer when it says something else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from fullrank.core.errors import InputError

Group = Mapping[str, Any]
Check = Callable[[str, Any], None]


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def is_whole(value: Any) -> bool:
    """Whether this is a whole number, of Python's or of NumPy's."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def plain(value: Any) -> Any:
    """Numbers as Python's own: of a saved state, ``torch.load`` reads no others by default.

    >>> import numpy
    >>> plain([numpy.int64(2), None])
    [2, None]
    """
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, tuple):
        return tuple(plain(each) for each in value)
    if isinstance(value, Real) and not isinstance(value, bool):
        return int(value) if isinstance(value, Integral) else float(value)
    return value


def at_least(least: float) -> Check:
    """A finite number (or a tensor, whose value is not read) that is not below ``least``."""

    def check(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            return
        if not _number(value) or value < least:
            raise InputError(f"{name}={value!r}; it must be a finite number >= {least:g}")

    return check


def finite(name: str, value: Any) -> None:
    """Any finite number."""
    if not _number(value):
        raise InputError(f"{name}={value!r}; it must be a finite number")


def positive(name: str, value: Any) -> None:
    """A finite number above 0."""
    if not _number(value) or value <= 0:
        raise InputError(f"{name}={value!r}; it must be a finite number > 0")


def whole(name: str, value: Any) -> None:
    """A whole number of at least 1."""
    if not is_whole(value) or value < 1:
        raise InputError(f"{name}={value!r}; it must be a whole number >= 1")


def one_of(*choices: Any) -> Check:
    """One of a few values."""

    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise InputError(f"{name}={value!r}; it is one of {', '.join(map(repr, choices))}")

    return check


def optional(check: Check) -> Check:
    """None, or what ``check`` lets through."""
    return lambda name, value: None if value is None else check(name, value)


def pair(check: Check) -> Check:
    """Two values, each of which ``check`` lets through."""

    def check_both(name: str, value: Any) -> None:
        if not isinstance(value, Sequence) or len(value) != 2:
            raise InputError(f"{name}={value!r}; it must be a pair of numbers")
        for i, each in enumerate(value):
            check(f"{name}[{i}]", each)

    return check_both


def decay_factor(name: str, value: Any) -> None:
    """The factor of an exponential moving average: in [0, 1)."""
    if not _number(value) or not 0 <= value < 1:
        raise InputError(f"{name}={value!r}; it must lie in [0, 1)")


def truth(name: str, value: Any) -> None:
    """True or False."""
    if not isinstance(value, bool):
        raise InputError(f"{name}={value!r}; it is True or False")


def rank(name: str, value: Any) -> None:
    """None, a whole number >= 1, or a list of these with one entry a parameter."""
    for each in value if isinstance(value, list | tuple) else [value]:
        if each is not None and (not is_whole(each) or each < 1):
            raise InputError(
                f"{name}={each!r}; it must be a whole number >= 1, or None for no projection"
            )


def fraction(name: str, value: Any) -> None:
    """A number in [0, 1]."""
    if not _number(value) or not 0 <= value <= 1:
        raise InputError(f"{name}={value!r}; it must lie in [0, 1]")


def integer(name: str, value: Any) -> None:
    """Any whole number."""
    if not is_whole(value):
        raise InputError(f"{name}={value!r}; it must be a whole number")


# What the groups of every optimizer that projects gradients may say.
ADAM: Mapping[str, Check] = {
    "lr": at_least(0.0),
    "betas": pair(decay_factor),
    "eps": at_least(0.0),
    "weight_decay": at_least(0.0),
}
KEPT: Mapping[str, Check] = {
    "gemm": one_of(None, "bfloat16"),
    "state_bits": one_of(32, 8),
    "min_8bit_size": whole,
    "stochastic_rounding": truth,
    "seed": integer,
}
PROJECTED: Mapping[str, Check] = {
    "rank": rank,
    "update_proj_gap": whole,
    "proj_type": one_of("std", "reverse_std", "left", "right", "full"),
    "refresh": one_of("svd", "subspace"),
    "moments": one_of("keep", "reset", "rotate"),
    **KEPT,
}


def check_group(group: Group, checks: Mapping[str, Check]) -> None:
    """Run every check on the group's value of that name.

    >>> check_group({"rank": 4, "scale": 0.25}, {"rank": rank, "scale": positive})
    >>> check_group({"rank": 0}, {"rank": rank})
    Traceback (most recent call last):
        ...
    fullrank.core.errors.InputError: rank=0; it must be a whole number >= 1, or None for no...
    """
    for name, check in checks.items():
        check(name, group[name])


def ranks_of(group: Group) -> list[int | None]:
    """One rank (or None) for every parameter of a group.

    Raises
    ------
    InputError
        When the group lists ranks, but not as many as parameters.
    """
    count = len(group["params"])
    value = group.get("rank")
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise InputError(
            f"a group of {count} parameters lists {len(value)} ranks; give one rank for all, "
            "or one a parameter"
        )
    return list(value)
