"""Metadata filters: which documents a search may find."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError, require

Mask: TypeAlias = npt.NDArray[np.bool_]
Where: TypeAlias = Mapping[str, Any] | str | Iterable[str]
"""What a filter is written as: see :func:`parse_where`."""

_OPERATORS = {
    "==": "equal",
    "!=": "not_equal",
    "<": "less",
    "<=": "less_equal",
    ">": "greater",
    ">=": "greater_equal",
}
# The name of a field may be anything but hold the start of an operator; mappings know no limit.
_CONDITION = re.compile(r"\s*([^=!<>]*[^=!<>\s])\s*(==|!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Condition:
    """One comparison: ``field operator value``; operators are those of Python, and ``"in"``."""

    field: str
    operator: str
    value: Any


def parse_where(where: Where) -> tuple[Condition, ...]:
    """Read a filter; all of its conditions have to hold.

    Parameters
    ----------
    where
        A mapping from field to a value (equal), a list of values (one of them), or a mapping from
        operators to values; or text such as ``"year>=2020"``, or several such texts.

    Raises
    ------
    InputError
        When it cannot be read.

    Examples
    --------
    >>> parse_where({"lang": ["en", "de"], "year": {">=": 2020}})
    (Condition(field='lang', operator='in', value=('en', 'de')),
     Condition(field='year', operator='>=', value=2020))
    >>> parse_where("year >= 2020")
    (Condition(field='year', operator='>=', value='2020'),)
    """
    if isinstance(where, str):
        where = [where]
    if not isinstance(where, Iterable):
        raise InputError(
            f"the filter {where!r} is a {type(where).__name__}; expected a mapping such as "
            "{'lang': 'en'} or text such as 'year>=2020'"
        )
    if not isinstance(where, Mapping):
        return tuple(map(_read, where))
    found: list[Condition] = []
    for name, value in where.items():
        field = str(name)
        if isinstance(value, Mapping):
            found += [Condition(field, _operator(o, field), v) for o, v in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            found.append(Condition(field, "in", tuple(value)))
        else:
            found.append(Condition(field, "==", value))
    return tuple(found)


def _read(text: str) -> Condition:
    parts = _CONDITION.fullmatch(text) if isinstance(text, str) else None
    if parts is None or not parts[3]:
        raise InputError(
            f"the filter {text!r} is no comparison such as 'lang=en' or 'year>=2020'; "
            f"operators are =, {', '.join(_OPERATORS)}"
        )
    return Condition(parts[1], "==" if parts[2] == "=" else parts[2], parts[3])


def _operator(operator: object, field: str) -> str:
    if operator not in (*_OPERATORS, "in"):
        raise InputError(
            f"the filter on {field!r} uses {operator!r}; operators are {', '.join(_OPERATORS)}, in"
        )
    return str(operator)


def matching(conditions: Iterable[Condition], read: Callable[[str], Any]) -> Mask:
    """Return which documents fulfil all conditions.

    A document without the field fulfils none, not even ``!=``. Where values are lists, ``==``
    holds when one of them is equal, and ``!=`` when none is.

    Parameters
    ----------
    conditions
        At least one.
    read
        Gives the Arrow column of a field.

    Raises
    ------
    InputError
        When a value cannot be compared with the values of its field.

    Examples
    --------
    >>> import pyarrow as pa
    >>> years = pa.array([2019, 2021, None])
    >>> matching(parse_where("year>2020"), lambda field: years).tolist()
    [False, True, False]
    """
    masks = [_holds(condition, read(condition.field)) for condition in conditions]
    if not masks:
        raise InputError("the filter is empty; leave it out, or give a condition")
    return np.asarray(np.logical_and.reduce(masks))


def _holds(condition: Condition, column: Any) -> Mask:
    pa = require("pyarrow", extra="search")
    compute = require("pyarrow.compute", extra="search")
    nested = pa.types.is_list(column.type)
    if nested and condition.operator == "!=":
        equal = _holds(Condition(condition.field, "==", condition.value), column)
        return np.asarray(compute.is_valid(column)) & ~equal
    flat = column.flatten() if nested else column
    try:
        if condition.operator == "in":
            if isinstance(condition.value, str):
                raise TypeError("a text is no list of values")
            values = [_scalar(v, flat.type) for v in condition.value]
            # Others, such as 0.5 among whole numbers, are equal to none of the field's.
            values = [value for value in values if value.type == flat.type]
            hits = compute.is_in(flat, value_set=pa.array(values, flat.type))
        else:
            compare = getattr(compute, _OPERATORS[condition.operator])
            hits = compare(flat, _scalar(condition.value, flat.type))
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        raise InputError(
            f"{condition.field!r} holds values of type {flat.type}, which cannot be compared "
            f"with {condition.value!r} by {condition.operator!r}"
        ) from None
    mask: Mask = np.asarray(compute.fill_null(hits, False), dtype=np.bool_)
    if not nested:
        return mask
    documents = np.asarray(compute.list_parent_indices(column))[mask]
    return np.asarray(np.bincount(documents, minlength=len(column)) > 0)


def _scalar(value: Any, kind: Any) -> Any:
    """Return a value as one of the column's type: what was written as text is read as it.

    Among whole numbers, one that is none or is beyond their range is a float.
    """
    pa = require("pyarrow", extra="search")
    if value is None:
        raise TypeError("nothing can be compared with None")
    if isinstance(value, str) and pa.types.is_boolean(kind):
        value = {"true": True, "false": False}[value.lower()] if value.lower() in _BOOLS else value
    elif isinstance(value, str) and not pa.types.is_large_string(kind):
        whole = pa.types.is_integer(kind) and _WHOLE.fullmatch(value)
        value = int(value) if whole else float(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and pa.types.is_integer(kind):
        whole = value == value // 1 and -(2**63) <= value < 2**63
        return pa.scalar(int(value), kind) if whole else pa.scalar(float(value), pa.float64())
    return pa.scalar(value, kind)


_BOOLS = ("true", "false")
_WHOLE = re.compile(r"[+-]?\d+")
