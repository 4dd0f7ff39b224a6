"""Libraries that print, log and reseed: kept quiet, and put back as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fullrank.core.models import quiet_transformers


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence progress bars and logs of transformers and datasets below errors."""
    import datasets

    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        with quiet_transformers(logs=True):
            yield
    finally:
        if bars:
            datasets.enable_progress_bars()


@contextmanager
def own_randomness() -> Iterator[None]:
    """Give back the caller's random states afterwards: trainers seed them all."""
    states = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextmanager
def training_form(
    model: Any, *, freeze_embeddings: bool, dropout: float | None, plain_attention: bool
) -> Iterator[None]:
    """Put a SentenceTransformer into the form it is trained in, and back.

    Parameters
    ----------
    model
        The model; changed inside the context only.
    freeze_embeddings
        Token embeddings ask for no gradient.
    dropout
        Probability of every ``nn.Dropout``, or None to leave them.
    plain_attention
        Use attention as separate matrix products where the model can: the backward pass of the
        fused kernel is three times slower on a CPU.
    """
    frozen = [p for p in _token_embeddings(model) if freeze_embeddings and p.requires_grad]
    layers = [m for m in model.modules() if dropout is not None and isinstance(m, nn.Dropout)]
    rates = [layer.p for layer in layers]
    for parameter in frozen:
        parameter.requires_grad_(False)
    for layer in layers:
        layer.p = dropout  # type: ignore[assignment]
    attention = [m for m in model if hasattr(m, "auto_model")] if plain_attention else []
    before = [_switch_attention(m.auto_model, "eager") for m in attention]
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for layer, rate in zip(layers, rates, strict=True):
            layer.p = rate
        for module, name in zip(attention, before, strict=True):
            if name is not None:
                _switch_attention(module.auto_model, name)


def _token_embeddings(model: Any) -> Iterator[nn.Parameter]:
    for module in model:
        get = getattr(getattr(module, "auto_model", None), "get_input_embeddings", None)
        if get is not None and isinstance(table := get(), nn.Module):
            yield from table.parameters()


def _switch_attention(model: Any, name: str) -> str | None:
    """Switch a model's attention; return what it was, or None where that cannot be done."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if before not in ("sdpa", "eager") or before == name:
        return None
    try:
        model.set_attn_implementation(name)
    except (AttributeError, ValueError):
        return None
    return str(before)


def precision_of(wanted: str, device: torch.device) -> torch.dtype | None:
    """Return what autocast computes in on a device, or None for no autocast.

    The rule looks at the hardware and measures nothing, so that a run repeats itself.
    """
    if wanted == "float32":
        return None
    if wanted == "bfloat16":
        return torch.bfloat16
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        native = any(getattr(torch.cpu, name, lambda: False)() for name in names)
    else:
        native = False
    return torch.bfloat16 if native else None
