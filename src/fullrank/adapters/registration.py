"""Make our tuners known to PEFT, so that its loaders and savers take them for some of theirs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fullrank.core.errors import require

TUNERS: Mapping[str, str] = {
    "FULLRANK_FLYLORA": "fullrank.adapters.flylora",
    "FULLRANK_HYDRA": "fullrank.adapters.hydra",
    "FULLRANK_LORA_SB": "fullrank.adapters.lora_sb",
    "FULLRANK_RANDLORA": "fullrank.adapters.randlora",
}
"""Type -> the module that makes it known to PEFT; a new tuner is a new row."""


def make_known(kind: str) -> None:
    """Make a type that a file names known to PEFT, where it is one of ours."""
    if kind in TUNERS:
        require(TUNERS[kind], extra="adapters")


def register_tuner(name: str, config_cls: Any, model_cls: Any) -> Any:
    """Add a tuner to PEFT under a type of its own, once.

    Parameters
    ----------
    name
        Lower case; the type is the same in upper case. Ours begin with ``fullrank_``: PEFT may
        come to have a method of the same name.
    config_cls, model_cls
        The tuner's configuration and model; the model's ``prefix`` is what the names of its
        tensors begin with.

    Returns
    -------
    PeftType
        The type, which the configurations carry from now on.
    """
    peft = require("peft", extra="adapters")
    utils = require("peft.utils.peft_types", extra="adapters")
    kind = _member(utils.PeftType, name.upper())
    if kind not in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING:
        utils.register_peft_method(
            name=name, config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix
        )
    config_cls.registered = kind
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
