"""A batch of model inputs, whatever its form: where it is, and how a model is run on it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from fullrank.core.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

Batch = Any
"""A tensor, a tuple or list of tensors (positional arguments) or a mapping (keyword arguments)."""

# Keys and values of attention from a decoder to its encoder, as models call them.
_FROM_ENCODER = re.compile(
    r"(EncDecAttention|encoder_attn|cross_?attn|cross_?attention).*\.(k|v|key|value)(_proj|_lin)?$",
    re.IGNORECASE,
)
# Output layers on top of a decoder.
_HEADS = ("lm_head", "proj_out")


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
    return _mapped(batch, lambda tensor: tensor.to(device))


def tensors_in(batch: Batch) -> list[torch.Tensor]:
    """Return the tensors of a batch, in order.

    Examples
    --------
    >>> import torch
    >>> len(tensors_in({"input_ids": torch.zeros(2, 3), "labels": torch.zeros(2)}))
    2
    """
    found: list[torch.Tensor] = []

    def seen(tensor: torch.Tensor) -> torch.Tensor:
        found.append(tensor)
        return tensor

    _mapped(batch, seen)
    return found


def rows_in(batch: Batch) -> int:
    """Return how many samples a batch has: the length of its first tensor.

    Raises
    ------
    InputError
        When it holds no tensor with a first dimension.

    Examples
    --------
    >>> import torch
    >>> rows_in({"input_ids": torch.zeros(2, 3)})
    2
    """
    found = _length(batch)
    if found is None:
        raise InputError("the batch holds no tensor of samples, so that they cannot be counted")
    return found


def first_rows(batch: Batch, count: int) -> Batch:
    """Return a batch of at most so many samples; tensors of other lengths stay whole.

    Examples
    --------
    >>> import torch
    >>> [part.tolist() for part in first_rows((torch.arange(3), torch.ones(1)), 2)]
    [[0, 1], [1.0]]
    """
    rows = rows_in(batch)
    if rows <= count:
        return batch
    return _mapped(batch, lambda t: t[:count] if t.ndim and len(t) == rows else t)


def call(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch: its arguments by name, in order, or the one it takes."""
    if isinstance(batch, Mapping):
        # A SentenceTransformer takes its features as one dictionary, and writes into it.
        return model(dict(batch)) if is_sentence_transformer(model) else model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def in_decoder(model: nn.Module, name: str) -> bool:
    """Whether a module of this name reads the tokens of a decoder, behind an encoder of others.

    Their mask is then the batch's ``decoder_attention_mask``.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> bart: Any = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=True))
    >>> [in_decoder(bart, f"model.decoder.layers.0.{name}.k_proj") for name in ("self_attn",
    ...     "encoder_attn")]
    [True, False]
    """
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    parts = name.split(".")
    return ("decoder" in parts or parts[0] in _HEADS) and not _FROM_ENCODER.search(name)


def is_sentence_transformer(model: nn.Module) -> bool:
    """Whether this is a sentence-transformers model, without importing the library."""
    return any(c.__name__ == "SentenceTransformer" for c in type(model).__mro__)


def _mapped(batch: Batch, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    import torch

    if isinstance(batch, torch.Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {name: _mapped(inner, change) for name, inner in batch.items()}
    if isinstance(batch, (tuple, list)):
        parts = [_mapped(inner, change) for inner in batch]
        # A named tuple takes its fields one by one.
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch


def _length(batch: Batch) -> int | None:
    import torch

    if isinstance(batch, torch.Tensor):
        return len(batch) if batch.ndim else None
    inner = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(batch, (Mapping, tuple, list)):
        return None
    return next((n for n in map(_length, inner) if n is not None), None)
