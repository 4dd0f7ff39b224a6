"""Adapters as ordinary LoRA, for loaders that know nothing of where they came from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.adapters.lora_files import LowRank, update_of, write_lora
from fullrank.adapters.lora_ga import start_of
from fullrank.core.errors import InputError, StoreError, require
from fullrank.core.names import canonical_name
from fullrank.core.table import Cell, Table

# PEFT's initialisations that take the start out of the base weight, which is then not known here.
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga")
_FACTOR = ".lora_A.weight"
_PREFIX = "base_model.model."


def to_lora(model: nn.Module, adapter: str = "default") -> dict[str, LowRank]:
    """Return the update of each layer as two factors, scaling included in ``B``.

    Parameters
    ----------
    model
        A ``PeftModel``.
    adapter
        Which adapter.

    Returns
    -------
    dict
        Name of a module of the base model -> ``A (r, in)`` and ``B (out, r)``. For LoRA-GA as
        :func:`fullrank.adapters.lora_ga.initialize` makes it r is twice its rank: the update is
        of the base model as it was.

    Raises
    ------
    InputError
        When there is no such adapter, an update is not of low rank (DoRA), is of no linear layer,
        comes with a bias, or belongs to a base weight that was changed (PiSSA).

    Examples
    --------
    >>> from fullrank.adapters.adapt import adapt
    >>> tuned = adapt(nn.Sequential(nn.Linear(6, 4)), "lora", rank=2)
    >>> {name: tuple(update.B.shape) for name, update in to_lora(tuned).items()}
    {'0': (4, 2)}
    """
    tuner_layer = require("peft.tuners.tuners_utils", extra="adapters").BaseTunerLayer
    configs = getattr(model, "peft_config", {})
    if adapter not in configs:
        raise InputError(f"there is no adapter {adapter!r}; there are {', '.join(configs) or '-'}")
    start = str(getattr(configs[adapter], "init_lora_weights", ""))
    if start.startswith(_CHANGED_BASE):
        raise InputError(
            f"{start} changed the base weights; save it with PEFT's "
            "path_initial_model_for_weight_conversion, or use merge_and_unload"
        )
    updates = {}
    for name, layer in model.named_modules():
        if isinstance(layer, tuner_layer) and adapter in layer._get_available_adapters():
            updates[name.removeprefix(_PREFIX)] = _update(name, layer, adapter)
    return updates


def save_as_lora(model: nn.Module, folder: str | Path, adapter: str = "default") -> Path:
    """Write an adapter as an ordinary LoRA that plain PEFT loads on a fresh base model.

    Parameters
    ----------
    model
        A ``PeftModel``.
    folder
        Where to write.
    adapter
        Which adapter.

    Raises
    ------
    InputError
        As :func:`to_lora`, and when whole modules were trained beside the layers.

    Examples
    --------
    >>> save_as_lora(tuned, "adapter")  # doctest: +SKIP
    """
    updates = to_lora(model, adapter)
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    if getattr(config, "modules_to_save", None) or getattr(config, "bias", "none") != "none":
        raise InputError(
            f"adapter {adapter!r} also trained {config.modules_to_save or 'biases'}, which are no "
            "low-rank update; use model.save_pretrained or merge_and_unload"
        )
    return write_lora(folder, updates, config)


def inspect(folder: str | Path) -> Table:
    """Show what is in a folder with a LoRA adapter, from its files alone.

    Parameters
    ----------
    folder
        With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns
    -------
    Table
        A row a layer: shape, rank, numbers, and the norm of ``B A`` before scaling.

    Raises
    ------
    StoreError
        When the folder holds no such adapter.

    Examples
    --------
    >>> inspect("adapter")  # doctest: +SKIP
    """
    config = _config(folder)
    rows: list[list[Cell]] = []
    for name, A, B in _factors(folder):
        if A.dim() != 2:
            continue
        size = float(torch.linalg.matrix_norm(B.float() @ A.float()))
        shape = f"{len(B)} x {A.shape[1]}"
        rows.append([name, shape, len(A), A.numel() + B.numel(), size])
    base = config.get("base_model_name_or_path") or "a model without a name"
    return Table(
        ["layer", "shape", "rank", "numbers", "norm"],
        rows,
        title=f"{config.get('peft_type')} for {base}",
        formats={"numbers": ",d"},
    )


def check_base(model: nn.Module, folder: str | Path) -> None:
    """Raise when a LoRA adapter on disk is for another base model than this one.

    PEFT itself leaves out what does not fit a name, and fails inside torch on another shape.

    Raises
    ------
    InputError
        Naming the layer that is missing or has another shape.
    StoreError
        When the folder holds no such adapter.

    Examples
    --------
    >>> check_base(model, "adapter")  # doctest: +SKIP
    """
    modules = dict(model.named_modules())
    for name, A, B in _factors(folder):
        module = modules.get(name)
        if module is None:
            raise InputError(
                f"{folder} is for another base model: this one has no module {name!r}; load "
                f"{_config(folder).get('base_model_name_or_path') or 'the one it was trained on'}"
            )
        weight: Any = getattr(module, "weight", None)
        shape = tuple(weight.shape) if weight is not None else ()
        expected = (B.shape[0], A.shape[1])
        if A.dim() == 2 and sorted(shape) != sorted(expected):
            raise InputError(
                f"{folder} is for another base model: {name} is {shape} here, and {expected} there"
            )


def _update(name: str, layer: Any, adapter: str) -> LowRank:
    if hasattr(layer, "to_lora"):
        found: LowRank = layer.to_lora(adapter)
        return found
    plain = canonical_name(name)
    if adapter not in getattr(layer, "lora_A", {}) or adapter in layer.lora_variant:
        raise InputError(
            f"the update of {plain} is not of low rank, or of no linear layer; use merge_and_unload"
        )
    if layer.lora_A[adapter].weight.dim() != 2 or layer.lora_bias[adapter]:
        raise InputError(f"{plain} is a convolution or has a bias of its own; use merge_and_unload")
    now, first = update_of(layer, adapter), start_of(layer)
    if first is None:
        return now
    return LowRank(
        torch.cat([now.A, first.A.to(now.A)]), torch.cat([now.B, -first.B.to(now.B)], dim=1)
    )


def _config(folder: str | Path) -> dict[str, Any]:
    try:
        text = (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder} holds no adapter: {error}") from error
    if not isinstance(config, dict):
        raise StoreError(f"{folder} holds no adapter: its configuration is no table")
    return config


def _factors(folder: str | Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Module name, ``A`` and ``B`` of each layer of a LoRA file."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / "adapter_model.safetensors"
    try:
        with safe_open(str(path), framework="pt") as file:
            keys = [key for key in file.keys() if key.endswith(_FACTOR)]  # noqa: SIM118
            if not keys:
                raise StoreError(f"{path} holds no LoRA factors")
            for key in keys:
                other = key.removesuffix(_FACTOR) + ".lora_B.weight"
                name = key.removesuffix(_FACTOR).removeprefix(_PREFIX)
                yield name, file.get_tensor(key), file.get_tensor(other)
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
