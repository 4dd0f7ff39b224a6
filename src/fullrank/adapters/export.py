"""Adapters as ordinary LoRA, for loaders that know nothing of where they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.adapters.lora_files import (
    LowRank,
    check_plain,
    trained_whole,
    update_of,
    write_lora,
)
from fullrank.adapters.lora_ga_model import start_of
from fullrank.adapters.lora_reading import CHANGED_BASE, factors, read_config
from fullrank.core.errors import InputError, require
from fullrank.core.names import canonical_name

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
        When there is no such adapter, an update is not of low rank (DoRA), is of no linear layer
        (a stack of experts), comes with a bias, or belongs to a base weight that was changed
        (PiSSA).

    Examples
    --------
    >>> from fullrank.adapters.adapt import adapt
    >>> tuned = adapt(nn.Sequential(nn.Linear(6, 4)), "lora", rank=2)
    >>> {name: tuple(update.B.shape) for name, update in to_lora(tuned).items()}
    {'0': (4, 2)}
    """
    updates, biases = _folded(model, adapter)
    for name in biases:
        raise InputError(
            f"{name}: the update comes with a bias, which these factors do not hold; save_as_lora "
            "writes both"
        )
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
        As :func:`to_lora`, when biases or single tokens were trained beside the layers, and when
        the adapter repeats layers. Modules that were trained whole (a classifier) are in the file
        too, as PEFT writes them, and biases that come with an update (Hydra's) as PEFT's
        ``lora_bias``.

    Examples
    --------
    >>> save_as_lora(tuned, "adapter")  # doctest: +SKIP
    """
    updates, biases = updates_and_biases(model, adapter)
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    return write_lora(folder, updates, config, trained_whole(model, adapter), biases=biases)


def updates_and_biases(
    model: nn.Module, adapter: str = "default"
) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """What :func:`save_as_lora` writes of an adapter's layers: what it refuses is refused here."""
    updates, biases = _folded(model, adapter)
    config: Any = model.peft_config[adapter]  # type: ignore[index]
    check_plain(vars(config), f"adapter {adapter!r}")
    if getattr(config, "bias", "none") != "none":
        raise InputError(
            f"adapter {adapter!r} also trained biases, which are no low-rank update; use "
            "model.save_pretrained or merge_and_unload"
        )
    if getattr(config, "trainable_token_indices", None):
        raise InputError(
            f"adapter {adapter!r} also trained single tokens, which are no low-rank update; use "
            "model.save_pretrained or merge_and_unload"
        )
    return updates, biases


def _folded(model: nn.Module, adapter: str) -> tuple[dict[str, LowRank], dict[str, Tensor]]:
    """Update of each layer, and the bias that comes with it, by names of the base model."""
    tuner_layer = require("peft.tuners.tuners_utils", extra="adapters").BaseTunerLayer
    configs = getattr(model, "peft_config", {})
    if adapter not in configs:
        raise InputError(f"there is no adapter {adapter!r}; there are {', '.join(configs) or '-'}")
    start = str(getattr(configs[adapter], "init_lora_weights", ""))
    if start.startswith(CHANGED_BASE):
        raise InputError(
            f"{start} changed the base weights; save it with PEFT's "
            "path_initial_model_for_weight_conversion, or use merge_and_unload"
        )
    updates, biases = {}, {}
    for name, layer in model.named_modules():
        if isinstance(layer, tuner_layer) and adapter in layer._get_available_adapters():
            plain = name.removeprefix(_PREFIX)
            updates[plain] = _update(name, layer, adapter)
            bias = layer.get_delta_bias(adapter) if hasattr(layer, "get_delta_bias") else None
            if bias is not None:
                biases[plain] = bias
    return updates, biases


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
    for name, A, B in factors(folder):
        module = modules.get(name)
        if module is None:
            base = read_config(folder).get("base_model_name_or_path")
            raise InputError(
                f"{folder} is for another base model: this one has no module {name!r}; load "
                f"{base or 'the one it was trained on'}"
            )
        weight: Any = getattr(module, "weight", None)
        shape = tuple(weight.shape) if weight is not None else ()
        expected = (B.shape[0], A.shape[1])
        if A.dim() == 2 and sorted(shape) != sorted(expected):
            raise InputError(
                f"{folder} is for another base model: {name} is {shape} here, and {expected} there"
            )


def _update(name: str, layer: Any, adapter: str) -> LowRank:
    plain = canonical_name(name)
    if hasattr(layer, "to_lora"):
        try:
            found: LowRank = layer.to_lora(adapter)
        except InputError as error:
            raise InputError(f"{plain}: {error}") from error
        return found
    # PEFT's layer around one parameter of a module, whatever that is.
    wrapped = getattr(layer, "parameter_name", None)
    linear = wrapped is None or (
        wrapped == "weight" and isinstance(layer.get_base_layer(), nn.Linear)
    )
    if not linear or adapter not in getattr(layer, "lora_A", {}) or adapter in layer.lora_variant:
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
