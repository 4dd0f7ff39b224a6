"""Adapter folders read from their files alone, without the base model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fullrank.adapters.lora_files import LowRank, check_plain
from fullrank.core.errors import InputError, StoreError, require
from fullrank.core.table import Cell, Table

WEIGHTS = "adapter_model.safetensors"
# PEFT's initialisations that take the start out of the base weight, which the files do not hold.
CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga")
_FACTOR = ".lora_A.weight"
_PREFIX = "base_model.model."


def read_lora(folder: str | Path) -> tuple[dict[str, LowRank], dict[str, Tensor], Any]:
    """Read the update of each layer, scaling included in ``B``, from a LoRA folder.

    Parameters
    ----------
    folder
        With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns
    -------
    dict, dict, LoraConfig
        Name of a module of the base model -> its update; tensors of modules that were trained
        whole, by their name in the file; the configuration.

    Raises
    ------
    InputError
        When the adapter is no update of low rank (DoRA, a convolution, an embedding, biases, a
        stack of experts, another type), of a base that was changed (PiSSA), or acts otherwise than
        by its updates alone (aLoRA, repeated layers).
    StoreError
        When the folder holds no adapter.

    Examples
    --------
    >>> updates, _, config = read_lora("adapter")  # doctest: +SKIP
    """
    peft = require("peft", extra="adapters")
    values = read_config(folder)
    kind, start = str(values.get("peft_type")), str(values.get("init_lora_weights", ""))
    if kind != "LORA":
        raise InputError(
            f"{folder} is a {kind} adapter, no LoRA; give its base model to convert it"
        )
    if start.startswith(CHANGED_BASE):
        raise InputError(
            f"{folder} was started by {start}, which changed the base weights; save it with PEFT's "
            "path_initial_model_for_weight_conversion"
        )
    if values.get("use_dora") or values.get("bias", "none") != "none" or values.get("lora_bias"):
        raise InputError(
            f"{folder} holds DoRA magnitudes or biases, which are no update of low rank; load it "
            "on its base model and use merge_and_unload"
        )
    check_plain(values, str(folder))
    whole = dict(_others(folder))
    for name in whole:
        if ".lora_" in name or "trainable_tokens" in name:
            raise InputError(
                f"{folder} holds {name}, which is no update of a linear layer; load it on its base "
                "model and use merge_and_unload"
            )
    config = peft.LoraConfig.from_pretrained(str(folder))
    # A linear layer names its matrix so.
    linear = all(name.endswith("weight") for name in values.get("target_parameters") or ())
    updates = {}
    for name, A, B in factors(folder):
        if A.dim() != 2:
            raise InputError(f"{folder}: {name} is a convolution; use merge_and_unload")
        rank = _of_layer(vars(config), "r", "rank_pattern", name)
        if len(A) != rank or not linear:
            raise InputError(
                f"{folder} holds updates of other parameters than matrices of linear layers, such "
                f"as a stack of experts ({name}: {len(A)} rows, rank {rank}); use merge_and_unload"
            )
        alpha = _of_layer(vars(config), "lora_alpha", "alpha_pattern", name)
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        updates[name] = LowRank(A, B * scaling)
    return updates, whole, config


def inspect(folder: str | Path) -> Table:
    """Show what is in a folder with an adapter, from its files alone.

    Parameters
    ----------
    folder
        With ``adapter_config.json`` and ``adapter_model.safetensors``.

    Returns
    -------
    Table
        LoRA: a row a layer: shape (of a stack of experts: how many, and that of each), rank,
        numbers, and the norm of ``B A`` before scaling; modules that were trained whole below
        them. Other types: a row a tensor.

    Raises
    ------
    StoreError
        When the folder holds no adapter.

    Examples
    --------
    >>> inspect("adapter")  # doctest: +SKIP
    """
    config = read_config(folder)
    rows: list[list[Cell]] = []
    if config.get("peft_type") == "LORA":
        for name, A, B in factors(folder):
            stacked = config.get("target_parameters")
            rank = _of_layer(config, "r", "rank_pattern", name) if stacked else len(A)
            rows.append([name, *_measures(A.flatten(1), B.flatten(1), rank)])
    for name, tensor in _others(folder):
        shape = " x ".join(map(str, tensor.shape))
        size = float(torch.linalg.vector_norm(tensor.float()))
        rows.append([name.removeprefix(_PREFIX), shape, None, tensor.numel(), size])
    base = config.get("base_model_name_or_path") or "a model without a name"
    total = sum(int(str(row[3])) for row in rows)
    return Table(
        ["layer", "shape", "rank", "numbers", "norm"],
        rows,
        title=f"{config.get('peft_type')} for {base}: {total:,} numbers",
        formats={"numbers": ",d"},
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises
    ------
    StoreError
        When there is none.
    """
    try:
        text = (Path(folder) / "adapter_config.json").read_text(encoding="utf-8")
        config = json.loads(text)
    except (OSError, ValueError) as error:
        raise StoreError(f"{folder} holds no adapter: {error}") from error
    if not isinstance(config, dict):
        raise StoreError(f"{folder} holds no adapter: its configuration is no table")
    return config


def factors(folder: str | Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Module name, ``A`` and ``B`` of each layer of a LoRA file."""
    with _opened(folder) as file:
        keys = set(file.keys())
        found = sorted(key for key in keys if key.endswith(_FACTOR))
        if not found:
            raise StoreError(f"{Path(folder) / WEIGHTS} holds no LoRA factors")
        for key in found:
            other = key.removesuffix(_FACTOR) + ".lora_B.weight"
            if other not in keys:
                raise StoreError(f"{Path(folder) / WEIGHTS} is damaged: {other} is missing")
            name = key.removesuffix(_FACTOR).removeprefix(_PREFIX)
            yield name, file.get_tensor(key), file.get_tensor(other)


def _measures(A: Tensor, B: Tensor, rank: int) -> list[Cell]:
    """Shape, rank, numbers and norm of an update, or of those of a stack of experts."""
    experts, shape = len(A) // rank, f"{len(B)} x {A.shape[1]}"
    # PEFT lays A out expert by expert, and the columns of B component by component.
    downs = A.float().view(experts, rank, -1)
    ups = B.float().view(len(B), rank, experts).permute(2, 0, 1)
    norms = [torch.linalg.matrix_norm(up @ down) for up, down in zip(ups, downs, strict=True)]
    shape = shape if experts == 1 else f"{experts} x {shape}"
    return [shape, rank, A.numel() + B.numel(), float(torch.stack(norms).norm())]


def _of_layer(settings: Mapping[str, Any], usual: str, patterns: str, name: str) -> Any:
    """A setting of a LoRA configuration that some layers may have of their own."""
    pattern_key = require("peft.utils.other", extra="adapters").get_pattern_key
    own = settings.get(patterns) or {}
    return own.get(pattern_key(own, name), settings[usual])


def _others(folder: str | Path) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of all that is no LoRA factor."""
    with _opened(folder) as file:
        for key in sorted(file.keys()):
            if not key.endswith((_FACTOR, ".lora_B.weight")):
                yield key, file.get_tensor(key)


def _opened(folder: str | Path) -> Any:
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / WEIGHTS
    try:
        return safe_open(str(path), framework="pt")
    except (OSError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
