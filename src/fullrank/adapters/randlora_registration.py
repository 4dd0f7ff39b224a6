"""Make RandLoRA's type known to PEFT, so that its loaders and savers take it for one of theirs."""

from __future__ import annotations

from typing import Any

from fullrank.core.errors import require


def register_tuner(name: str, config_cls: type, model_cls: type, prefix: str) -> Any:
    """Add a tuner to PEFT under a type of its own, once.

    Parameters
    ----------
    name
        Lower case; the type is the same in upper case.
    config_cls, model_cls
        The tuner's configuration and model.
    prefix
        What the names of its parameters begin with.

    Returns
    -------
    PeftType
        The type.
    """
    peft = require("peft", extra="adapters")
    utils = require("peft.utils.peft_types", extra="adapters")
    kind = _member(utils.PeftType, name.upper())
    if kind not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        utils.register_peft_method(
            name=name, config_cls=config_cls, model_cls=model_cls, prefix=prefix
        )
    return kind


def _member(enum: Any, name: str) -> Any:
    """Return the member of a string enumeration, made by hand where there is none yet.

    PEFT registers only what its enumeration names, and Python's are closed.
    """
    if name in enum.__members__:
        return enum[name]
    member = str.__new__(enum, name)
    member._name_, member._value_ = name, name
    member.__objclass__ = enum
    member._sort_order_ = len(enum._member_names_)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member
    type.__setattr__(enum, name, member)
    return member
