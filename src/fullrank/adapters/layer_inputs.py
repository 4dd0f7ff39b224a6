"""What flows into the layers that adapters sit on: which tokens count, which layers share it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.adapters.bases import is_linear
from fullrank.core.capture import capture
from fullrank.core.errors import InputError

# transformers' and PEFT's mark of a position that has no label.
_NO_LABEL = -100


def lora_layers(model: nn.Module, adapter: str) -> dict[str, Any]:
    """Name -> PEFT's LoRA layer over a matrix that has this adapter.

    Raises
    ------
    InputError
        When the model is no PEFT model, or has no such adapter or no such layer.
    """
    configs = getattr(model, "peft_config", None)
    if configs is None:
        raise InputError(
            f"the model is a {type(model).__name__}; put a LoRA adapter on it first, with "
            "peft.get_peft_model(model, LoraConfig(...))"
        )
    if adapter not in configs:
        raise InputError(f"there is no adapter {adapter!r}; there are {', '.join(configs)}")
    found = {
        name: module
        for name, module in model.named_modules()
        if adapter in getattr(module, "lora_A", {}) and _is_matrix(module)
    }
    if not found:
        raise InputError(
            f"adapter {adapter!r} is on no linear layer; its target_modules are "
            f"{configs[adapter].target_modules}"
        )
    return found


def keep_dtype(layer: Any, adapter: str, dtype: torch.dtype) -> None:
    """Give a layer's factors back the type they had before PEFT's ``update_layer``.

    It makes new ones in the base's type, where ``get_peft_model`` keeps them in float32.
    """
    layer.lora_A[adapter].to(dtype)
    layer.lora_B[adapter].to(dtype)


def _is_matrix(layer: Any) -> bool:
    return is_linear(layer.get_base_layer())


def token_mask(batch: Any, *, labels: bool) -> Tensor | None:
    """``(batch, length)`` mask of the tokens that count, or None where all do."""
    if not isinstance(batch, Mapping):
        return None
    mask = batch.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
    given = batch.get("labels")
    if labels and isinstance(given, Tensor) and given.ndim == 2:
        real = given != _NO_LABEL
        mask = real if mask is None or mask.shape != real.shape else mask & real
    return mask


@contextmanager
def watch_inputs(
    layers: Mapping[str, nn.Module],
    consume: Callable[[str, Tensor], None],
    mask: Tensor | None = None,
) -> Iterator[None]:
    """Call ``consume(name, x)`` with the tokens ``(T, n)`` that flow into each layer and count."""
    with capture(layers, lambda name, x: consume(name, _counted(x, mask)), "input"):
        yield


def _counted(x: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None and x.shape[:-1] == mask.shape:
        x = x[mask.to(x.device)]
    return x.reshape(-1, x.shape[-1])


def same_inputs(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    batch: Any,
    forward: Callable[[nn.Module, Any], Any],
    mask: Tensor | None,
    consume: Callable[[str, Tensor], None] | None = None,
) -> dict[str, str]:
    """Layer -> the first layer that gets the very same input, itself if it is the first.

    ``consume`` receives each input once, under the first one's name.
    """
    marks: dict[str, tuple[Any, ...]] = {}
    owner: dict[tuple[Any, ...], str] = {}

    def mark(name: str, x: Tensor) -> None:
        # All tokens: of those that count there may be none in this batch, for any layer.
        flat = x.double().reshape(-1)
        weights = torch.linspace(1, 2, flat.numel(), dtype=torch.float64, device=x.device)
        sums = torch.stack([flat.sum(), flat.square().sum(), flat @ weights])
        marks[name] = (tuple(x.shape), *sums.tolist())
        if owner.setdefault(marks[name], name) == name and consume is not None:
            consume(name, _counted(x, mask))

    with capture(layers, mark, "input"):
        forward(model, batch)
    unused = [name for name in layers if name not in marks]
    if unused:
        raise InputError(
            f"{unused[0]} was not used in a forward pass: leave it out of target_modules, or give "
            "batches that use it"
        )
    return {name: owner[marks[name]] for name in layers}
