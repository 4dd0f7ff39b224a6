"""A model that LoRA-GA started: what was added at the start is known to each layer.

The adapter's first product ``s B_0 A_0`` is either taken out of the weight or subtracted from the
output. Saved are ordinary LoRA factors of twice the rank, for the base model as it was, and beside
them the training's own factors, so that a Trainer goes on from a checkpoint bit by bit.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fullrank.adapters.layer_inputs import lora_layers
from fullrank.adapters.lora_files import LowRank, trained_whole, update_of, write_lora
from fullrank.adapters.lora_ga_start import Start
from fullrank.core.errors import InputError, require
from fullrank.core.names import canonical_name

Mode = Literal["residual", "subtract_init"]

TRAINING = "lora_ga_training.safetensors"
"""Beside the adapter: the factors as they are trained, and as they were at the start."""

_PREFIX = "base_model.model."


@torch.no_grad()
def install(layer: Any, start: Start, adapter: str, mode: Mode) -> None:
    """Set the factors, and make up for exactly what the stored ones add."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    A.copy_(start.A)
    B.copy_(start.B)
    first = update_of(layer, adapter)
    # Buffers go where the layer goes, and into a whole model's checkpoints.
    layer.register_buffer("ga_start_A", first.A.detach().clone())
    layer.register_buffer("ga_start_B", first.B.detach().clone())
    layer.ga_mode, layer.ga_adapter = mode, adapter
    layer.register_forward_hook(_make_up)
    if mode == "subtract_init":
        layer.get_delta_weight = types.MethodType(_delta_weight, layer)
        return
    _add_to_weight(layer, -layer.scaling[adapter], B, A)


def _add_to_weight(layer: Any, scale: float, B: Tensor, A: Tensor) -> None:
    weight = layer.get_base_layer().weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    offset = scale * (B.to(wide) @ A.to(wide))
    weight.copy_(weight.to(wide) + oriented(layer, offset))


def _changed(model: Any, adapter: str, merging: Sequence[str]) -> list[Any]:
    """Layers whose weights lack the start, unless the adapter that has it is in them."""
    return [
        module
        for module in model.modules()
        if changed_base(module) and adapter not in (*merging, *module.merged_adapters)
    ]


@torch.no_grad()
def _put_back(layers: Sequence[Any]) -> None:
    """Give changed weights back what was taken out of them, up to rounding."""
    for layer in layers:
        _add_to_weight(layer, 1.0, layer.ga_start_B, layer.ga_start_A)


def start_of(layer: nn.Module) -> LowRank | None:
    """What LoRA-GA added to a layer at the start, scaling included; None where it did not."""
    if not hasattr(layer, "ga_start_A"):
        return None
    return LowRank(layer.ga_start_A, layer.ga_start_B)  # type: ignore[arg-type]


def changed_base(layer: nn.Module) -> bool:
    """Whether LoRA-GA took the start out of this layer's weight."""
    return getattr(layer, "ga_mode", None) == "residual"


def oriented(layer: Any, matrix: Tensor) -> Tensor:
    """``(out, in)``: Conv1D stores the transpose."""
    return matrix.T if getattr(layer, "fan_in_fan_out", False) else matrix


def saves_for_the_base(model: Any, adapter: str) -> Any:
    """Let a PEFT model save what fits a fresh base, load what a training goes on from, and give
    the base back.
    """
    usual = type(model)

    def save_pretrained(
        self: Any,
        save_directory: str | Path,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        **options: Any,
    ) -> None:
        asked = list(self.peft_config) if selected_adapters is None else selected_adapters
        others = [name for name in asked if name != adapter]
        if others:
            usual.save_pretrained(self, str(save_directory), safe_serialization, others, **options)
        if len(others) < len(asked) and options.get("is_main_process", True):
            _save(self, Path(save_directory), adapter)

    def load_adapter(
        self: Any, model_id: Any, adapter_name: str, *args: Any, **options: Any
    ) -> Any:
        training = Path(model_id) / TRAINING
        if adapter_name != adapter or not training.is_file():
            return usual.load_adapter(self, model_id, adapter_name, *args, **options)
        return _restore(self, Path(model_id), adapter)

    def unload(self: Any) -> Any:
        changed = _changed(self, adapter, [])
        base = self.base_model.unload()
        _put_back(changed)
        return base

    def merge_and_unload(
        self: Any,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        changed = _changed(self, adapter, adapter_names or self.active_adapters)
        base = self.base_model.merge_and_unload(progressbar, safe_merge, adapter_names)
        _put_back(changed)
        return base

    model.save_pretrained = types.MethodType(save_pretrained, model)
    model.load_adapter = types.MethodType(load_adapter, model)
    model.unload = types.MethodType(unload, model)
    model.merge_and_unload = types.MethodType(merge_and_unload, model)
    return model


def _make_up(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """Forward hook: a layer whose weight was changed adds the start back with the adapter off; one
    that was not subtracts it with the adapter on.
    """
    working = layer.merged_adapters if layer.merged else layer.active_adapters
    on = layer.ga_adapter in working and not layer.disable_adapters
    if layer.ga_mode == "residual":
        if on:
            return None
        sign = 1.0
    else:
        if not on or layer.merged:
            return None
        sign = -1.0
    # In the type that the layer multiplies in: what is taken away is then what was added.
    A, B = layer.ga_start_A, layer.ga_start_B
    made_up: Tensor = output + sign * linear(linear(inputs[0].to(A), A), B)
    return made_up.to(output.dtype)


def _delta_weight(layer: Any, adapter: str) -> Tensor:
    """What merging adds to the weight: PEFT's, without the start."""
    found: Tensor = type(layer).get_delta_weight(layer, adapter)
    if adapter != layer.ga_adapter:
        return found
    start = oriented(layer, layer.ga_start_B.to(found) @ layer.ga_start_A.to(found))
    return found - start


def _save(model: Any, folder: Path, adapter: str) -> None:
    from safetensors.torch import save

    updates: dict[str, LowRank] = {}
    training: dict[str, Tensor] = {}
    for name, layer in lora_layers(model, adapter).items():
        plain = name.removeprefix(_PREFIX)
        first, now = LowRank(layer.ga_start_A, layer.ga_start_B), update_of(layer, adapter)
        A = torch.cat([now.A, first.A.to(now.A)])
        updates[plain] = LowRank(A, torch.cat([now.B, -first.B.to(now.B)], dim=1))
        for key, tensor in _trained(layer, adapter).items():
            training[f"{plain}.{key}"] = tensor.detach().cpu().contiguous()
    beside = {TRAINING: save(training, {"format": "pt"})}
    write_lora(folder, updates, model.peft_config[adapter], trained_whole(model, adapter), beside)


@torch.no_grad()
def _restore(model: Any, folder: Path, adapter: str) -> Any:
    """Bring a model, started in the same way, to where a checkpoint was written."""
    from safetensors.torch import load_file

    peft = require("peft", extra="adapters")
    saved = load_file(folder / TRAINING)
    layers = lora_layers(model, adapter)
    for name, layer in layers.items():
        for key, tensor in _trained(layer, adapter).items():
            found = saved.get(f"{name.removeprefix(_PREFIX)}.{key}")
            if found is None or found.shape != tensor.shape:
                raise InputError(
                    f"{folder} has other layers or ranks than this model, "
                    f"{canonical_name(name)} for one; start it with the same settings and data"
                )
            fixed = key.startswith("start") and layer.ga_mode == "residual"
            if fixed and not torch.equal(found.to(tensor), tensor):
                raise InputError(
                    f"{folder} was started from other gradients: what was taken out of the weight "
                    f"of {canonical_name(name)} differs; start it with the same data and seed, or "
                    "use mode='subtract_init', which leaves the weights alone"
                )
    for name, layer in layers.items():
        for key, tensor in _trained(layer, adapter).items():
            tensor.copy_(saved[f"{name.removeprefix(_PREFIX)}.{key}"])
    whole = {
        key: tensor
        for key, tensor in load_file(folder / "adapter_model.safetensors").items()
        if ".lora_" not in key
    }
    return peft.set_peft_model_state_dict(model, whole, adapter_name=adapter)


def _trained(layer: Any, adapter: str) -> dict[str, Tensor]:
    return {
        "A": layer.lora_A[adapter].weight,
        "B": layer.lora_B[adapter].weight,
        "start_A": layer.ga_start_A,
        "start_B": layer.ga_start_B,
    }
