"""`LMTraining`: a language model's training run as a file says it."""

from __future__ import annotations

import copy
import datetime
import json
import tomllib
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fullrank.core.errors import InputError, require
from fullrank.training.config import MOST_SEED

Precision = Literal["auto", "bfloat16", "float32"]


class Section(BaseModel):
    """Keys of a run that belong together; one that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, values: Any) -> Any:
        """A section whose keys are all commented out is null in YAML: it is left out."""
        if not isinstance(values, dict):
            return values
        empty = {name for name, value in values.items() if value is None and cls._holds_keys(name)}
        return {name: value for name, value in values.items() if name not in empty}

    @classmethod
    def _holds_keys(cls, name: str) -> bool:
        kind: Any = getattr(cls.model_fields.get(name), "annotation", None)
        kind = get_origin(kind) or kind
        return isinstance(kind, type) and issubclass(kind, dict | Section)


class ModelSection(Section):
    """What is trained.

    Parameters
    ----------
    name
        A folder or a Hugging Face name to go on from; or
    config
        keys of a transformers configuration, ``model_type`` among them, of a model to start at
        random. ``vocab_size`` is the tokenizer's where it is left out.
    dtype
        Of the weights.
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.name is None) == (self.config is None):
            raise ValueError("give either name (to go on from) or config (to start at random)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs a model_type, e.g. model_type: llama")
        return self


class DataSection(Section):
    """What it is trained on.

    Parameters
    ----------
    source
        See :func:`~fullrank.datasets.read_texts`.
    field
        Field or column that holds the text.
    tokenizer
        ``"bytes"``: one token a byte; or a folder or Hugging Face name. None takes that of the
        model that is gone on from, bytes for a new one.
    context
        Tokens of a sequence.
    dev_bytes
        Text of the dev part to measure on, about.
    """

    source: str = "python_source"
    field: str = "text"
    tokenizer: str | None = None
    context: int = Field(default=256, ge=8)
    dev_bytes: int = Field(default=100_000, ge=1000)


class OptimizerSection(Section):
    """How weights are updated.

    Parameters
    ----------
    name
        See :func:`~fullrank.training.optimizer_names`.
    lr
        Peak rate of the body: weight matrices inside the blocks.
    head_lr
        Of all else: embeddings, output head, norms, biases. None takes ``lr``.
    rank
        Of optimizers that have one.
    weight_decay
        Of matrices of the body.
    options
        Other arguments of the optimizer, by name.
    per_layer
        Step each layer within the backward pass and free its gradient; without clipping.
    """

    name: str = "adamw"
    lr: float = Field(default=1e-3, gt=0)
    head_lr: float | None = Field(default=None, gt=0)
    rank: int | None = Field(default=None, ge=1)
    weight_decay: float = Field(default=0.0, ge=0)
    options: dict[str, Any] = Field(default_factory=dict)
    per_layer: bool = False


class LoopSection(Section):
    """How long, and how it is watched.

    Parameters
    ----------
    steps, seconds
        Optimizer steps, and a limit of the wall clock; the learning rate reaches 0 by whichever
        comes first.
    batch_size, accumulation
        Sequences of a pass, and passes of a step.
    warmup, decay
        Share of the run in which the rate rises; how it falls.
    clip
        Largest norm of all gradients; None never clips.
    precision
        bfloat16 autocast where the hardware has it, or not.
    evaluations, patience
        How often the dev part is measured; evaluations without a new best after which to stop.
    """

    steps: int = Field(default=1000, ge=1)
    seconds: float | None = Field(default=None, gt=0)
    batch_size: int = Field(default=16, ge=1)
    accumulation: int = Field(default=1, ge=1)
    warmup: float = Field(default=0.1, ge=0, lt=1)
    decay: Literal["linear", "cosine", "constant"] = "cosine"
    clip: float | None = Field(default=1.0, gt=0)
    precision: Precision = "auto"
    evaluations: int = Field(default=10, ge=1)
    patience: int | None = Field(default=None, ge=1)
    device: str | None = None
    seed: int = Field(default=0, ge=0, le=MOST_SEED)


class RunSettings(Section):
    """A run as a file says it, with changes on the command line."""

    @classmethod
    def read(cls, path: str | Path, changes: Sequence[str] = ()) -> Self:
        """Read a YAML or TOML file; ``changes`` are ``section.key=value`` and win."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"there is no file {path}; expected a YAML or TOML file")
        try:
            text = path.read_text(encoding="utf-8-sig")
            values = tomllib.loads(text) if path.suffix.lower() == ".toml" else _yaml(text)
        except Exception as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if not isinstance(values, dict):
            expected = ", ".join(f"{name}:" for name in cls.model_fields)
            raise InputError(f"{path} holds no sections; expected {expected}")
        return cls.of(values, changes)

    @classmethod
    def of(cls, values: dict[str, Any], changes: Sequence[str] = ()) -> Self:
        """Build a run from nested values, and changes to them."""
        values = copy.deepcopy(values)
        before = _optimizer(values).get("name")
        for change in changes:
            _change(values, change)
        if before is not None and _optimizer(values).get("name") != before:
            _leave_foreign(values["optimizer"], before, {c.partition("=")[0] for c in changes})
        try:
            values = json.loads(json.dumps(values, default=_date_as_text))
        except TypeError as error:
            raise InputError(f"the run holds what no file could say: {error}") from error
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, e['loc'])) or 'the run'}: {cls._wrong(e['type'], e)}"
                for e in error.errors()
            ]
            raise InputError("; ".join(lines)) from error

    @classmethod
    def _wrong(cls, kind: str, error: Mapping[str, Any]) -> str:
        if kind != "extra_forbidden":
            return str(error["msg"]).removeprefix("Value error, ")
        known: Any = cls
        for section in error["loc"][:-1]:
            known = known.model_fields[section].annotation
        return f"there is no such key; there are {', '.join(known.model_fields)}"

    def as_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return self.model_dump(mode="json")


class LMTraining(RunSettings):
    """A run: model, data, optimizer, loop.

    Raises
    ------
    InputError
        From :meth:`read` and :meth:`of`, naming every value that makes no sense.

    Examples
    --------
    >>> run = LMTraining.of({"model": {"config": {"model_type": "llama"}}}, ["loop.steps=20"])
    >>> run.loop.steps, run.optimizer.name
    (20, 'adamw')
    """

    model: ModelSection
    data: DataSection = DataSection()
    optimizer: OptimizerSection = OptimizerSection()
    loop: LoopSection = LoopSection()

    @model_validator(mode="after")
    def _fitting(self) -> Self:
        if self.optimizer.per_layer and self.loop.clip is not None:
            raise ValueError(
                "optimizer.per_layer frees each gradient before the norm of all is known; set "
                "loop.clip to null, on the command line (loop.clip=null) where a TOML file has none"
            )
        return self


def _date_as_text(value: Any) -> str:
    """YAML and TOML have dates, where a name is meant."""
    if isinstance(value, datetime.date | datetime.time):
        return str(value)
    raise TypeError(f"{value!r} is a {type(value).__name__}")


def _optimizer(values: dict[str, Any]) -> dict[str, Any]:
    section = values.get("optimizer")
    return section if isinstance(section, dict) else {}


def _leave_foreign(section: dict[str, Any], before: str, changed: set[str]) -> None:
    """Leave out what a file says for one optimizer and the one that took its place lacks."""
    from fullrank.training.lm_optimizers import foreign_settings

    left_out = []
    for setting in foreign_settings(str(section["name"]), section):
        key, _, option = setting.partition(".")
        # What was asked for together with the other optimizer is an error of its own.
        if changed.isdisjoint({f"optimizer.{key}", f"optimizer.{setting}"}):
            del (section[key] if option else section)[option or key]
            left_out.append(f"optimizer.{setting}")
    if left_out:
        warnings.warn(
            f"{section['name']} takes no {', '.join(left_out)}: left out of what the file says "
            f"for {before}",
            stacklevel=4,
        )


def _yaml(text: str) -> Any:
    return require("yaml", extra="hf").safe_load(text)


def _change(values: dict[str, Any], change: str) -> None:
    name, equals, text = change.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not sections or not key:
        raise InputError(f"{change!r} is no change; write section.key=value, e.g. loop.steps=200")
    for section in sections:
        inner = values.get(section)
        inner = values[section] = {} if inner is None else inner
        if not isinstance(inner, dict):
            raise InputError(f"{change!r}: {section} is a value, not a section")
        values = inner
    try:
        values[key] = _yaml_scalar(text)
    except Exception as error:
        raise InputError(f"{change!r} cannot be read: {' '.join(str(error).split())}") from error


def _yaml_scalar(text: str) -> Any:
    value = _yaml(text)
    # YAML 1.1 takes 1e-3 for a string; float() takes words such as nan for numbers.
    if isinstance(value, str) and any(map(str.isdigit, value)):
        try:
            return float(value)
        except ValueError:
            return value
    return value
