"""What the configurations of our tuners share: targets, one layer's settings, checks, a note."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from fullrank.core.errors import InputError, require

_peft: Any = require("peft", extra="adapters")
_other: Any = require("peft.utils.other", extra="adapters")

_NOTE = """
## Loading

This adapter is of type `{kind}`, which PEFT learns from the package fullrank:
write `import {module}` before `PeftModel.from_pretrained`, or PEFT does not know the type.
"""


@dataclass
class TunerConfig(_peft.PeftConfig):  # type: ignore[misc]
    """Base of the configurations: a tuner adds its own fields, and says what it has.

    Parameters
    ----------
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save
        PEFT's. ``nn.Linear`` and ``Conv1D`` only.
    alpha
        For the scaling; None for the tuner's default.
    dropout
        Of the adapters' inputs, 0.
    bias
        ``"none"``, ``"all"``, or the prefix with ``_only``: biases of adapted layers are trained.
    init_weights
        False starts from numbers that change outputs at once; for tests.

    Attributes
    ----------
    choices
        Field -> the values it may have.
    patterns
        Field that holds ``{pattern of a module's name: value}`` -> the field it stands in for.
    registered
        PEFT's type, set by :func:`~fullrank.adapters.registration.register_tuner`.
    """

    target_modules: list[str] | str | None = None
    alpha: float | None = None
    dropout: float = 0.0
    bias: str = "none"
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_weights: bool = True

    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    patterns: ClassVar[Mapping[str, str]] = {}
    registered: ClassVar[Any] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.registered
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.alpha is not None and not 0 < self.alpha < float("inf"):
            raise InputError(f"alpha={self.alpha!r}; it is positive, or None for the default")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout!r}; it is at least 0 and below 1")
        for name, known in self.choices.items():
            if getattr(self, name) not in known:
                choices = ", ".join(map(repr, known))
                raise InputError(f"{name}={getattr(self, name)!r}; it is one of {choices}")

    def check_whole(self, name: str, least: int) -> None:
        """Raise unless a field, and every value of its pattern, is a whole number from ``least``.

        Raises
        ------
        InputError
            Naming the field and its value.
        """
        stand_ins = [
            getattr(self, p).values() for p, field in self.patterns.items() if field == name
        ]
        for value in [getattr(self, name), *(v for values in stand_ins for v in values)]:
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r}; it is a whole number of at least {least}")

    def at(self, module: str) -> Self:
        """Return the settings of one layer: what the patterns say of its name."""
        found = copy.copy(self)
        for pattern, name in self.patterns.items():
            if self.says(pattern, module):
                values = getattr(self, pattern)
                setattr(found, name, values[_other.get_pattern_key(values, module)])
        return found

    def says(self, pattern: str, module: str) -> bool:
        """Whether one of the patterns has something for a layer."""
        values = getattr(self, pattern)
        return _other.get_pattern_key(values, module) in values

    def save_pretrained(self, save_directory: str, **options: Any) -> None:
        """Write ``adapter_config.json``, and how to load the adapter into ``README.md``."""
        super().save_pretrained(save_directory, **options)
        card = Path(save_directory) / "README.md"
        text = card.read_text(encoding="utf-8") if card.is_file() else ""
        module = type(self).__module__
        if f"`import {module}`" not in text:
            note = _NOTE.format(kind=self.peft_type.value, module=module)
            card.write_text(text + note, encoding="utf-8")
