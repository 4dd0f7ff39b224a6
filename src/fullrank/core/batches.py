"""A batch of model inputs, whatever its form: where it is, and how a model is run on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

Batch = Any
"""A tensor, a tuple or list of tensors (positional arguments) or a mapping (keyword arguments)."""


def device_of(model: nn.Module) -> torch.device:
    """Return where a model's weights are; the CPU for one without, or with none loaded yet."""
    import torch

    real = (p.device for p in model.parameters() if p.device.type != "meta")
    return next(real, torch.device("cpu"))


def moved(batch: Batch, device: torch.device) -> Batch:
    """Return a batch with its tensors on a device; tuples, lists and mappings keep their form.

    Examples
    --------
    >>> import torch
    >>> moved({"input_ids": torch.zeros(2, 3)}, torch.device("meta"))["input_ids"].device
    device(type='meta')
    """
    import torch

    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: moved(inner, device) for name, inner in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [moved(inner, device) for inner in batch]
        # A named tuple takes its fields one by one.
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def call(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch: its arguments by name, in order, or the one it takes."""
    if isinstance(batch, Mapping):
        # A SentenceTransformer takes its features as one dictionary, and writes into it.
        return model(dict(batch)) if is_sentence_transformer(model) else model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def is_sentence_transformer(model: nn.Module) -> bool:
    """Whether this is a sentence-transformers model, without importing the library."""
    return any(c.__name__ == "SentenceTransformer" for c in type(model).__mro__)
