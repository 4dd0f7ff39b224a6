"""What adapters go on: linear layers, and factorised ones that stand for a linear layer.

A factorised layer, from wherever it comes, has ``in_features``, ``out_features``, ``transposed``
(whether it stands for a ``Conv1D``), a ``weight`` that is read only, and ``to_dense()``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_kinds: dict[type[nn.Module], Callable[[nn.Module], object]] = {}


def register_factorised(
    kind: type[nn.Module], record: Callable[[nn.Module], object] = lambda model: None
) -> None:
    """Make a kind of factorised layer known to adapters.

    Parameters
    ----------
    kind
        Its class.
    record
        Called with a model in which merging an adapter made such layers dense, so that files say
        so.
    """
    _kinds[kind] = record


def is_factorised(module: object) -> bool:
    """Whether a layer is a product of factors in a linear layer's place."""
    return isinstance(module, tuple(_kinds))


def is_linear(module: object) -> bool:
    """Whether this is ``nn.Linear``, transformers' ``Conv1D``, or factors in their place."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or is_factorised(module)


def is_conv1d(module: object) -> bool:
    """Whether this is transformers' ``Conv1D``, whose weight is ``(in, out)``."""
    return type(module).__name__ == "Conv1D"


def is_transposed(layer: Any) -> bool:
    """Whether a linear layer's weight is ``(in, out)``."""
    return bool(layer.transposed) if is_factorised(layer) else not isinstance(layer, nn.Linear)


def shape_of(layer: Any) -> tuple[int, int]:
    """``(out, in)`` of a linear layer, quantised or not, factorised or not."""
    # A quantised weight is packed: its shape is not the layer's.
    if isinstance(layer, nn.Linear) or is_factorised(layer):
        return layer.out_features, layer.in_features
    width, out = layer.weight.shape
    return out, width


def record_factorised(model: nn.Module) -> None:
    """Let what saves a model know which of its layers are still factorised."""
    for record in _kinds.values():
        record(model)


def include_all_linear(config: Any, model: nn.Module) -> None:
    """Write out ``target_modules="all-linear"``: PEFT's layers, and the factorised ones."""
    from peft.tuners import tuners_utils

    asked = config.target_modules
    tuners_utils._maybe_include_all_linear_layers(config, model)
    if isinstance(asked, str) and asked.lower() == "all-linear":
        head = getattr(model, "get_output_embeddings", lambda: None)()
        config.target_modules |= {
            name
            for name, module in model.named_modules()
            if is_factorised(module) and module is not head and not name.endswith(".base_layer")
        }
