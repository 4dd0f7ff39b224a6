"""Layers that hold query, key and value at once: which of their outputs are whose."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

# Rows of the gradient: a run of them, or their numbers.
Rows = slice | Tensor

_FUSED = re.compile(r"(^|[._])(c_attn|qkv_proj|qkv|Wqkv|query_key_value)$")
# Of `query_key_value` there are many layouts; these have all three of a head side by side.
_BY_HEAD = frozenset({"bloom", "gpt_neox", "gpt_neox_japanese", "minimax", "persimmon"})


def parts_of(name: str, layer: nn.Module, config: Any) -> dict[str, Rows]:
    """Rows of the gradient by projection: query, key and value apart where one layer holds them.

    Known are the layouts of transformers' models: one below the other (GPT-2, Phi-3), head by head
    (GPT-NeoX, Bloom), group by group (Falcon). A layer of unknown layout is one part.

    >>> parts_of("h.0.attn.c_attn", nn.Linear(4, 12), None)
    {'h.0.attn.c_attn[q]': slice(0, 4, None), 'h.0.attn.c_attn[k]': slice(4, 8, None), \
'h.0.attn.c_attn[v]': slice(8, 12, None)}
    """
    out, width = _shape(layer)
    layout = _layout(name, config, out, width) if _FUSED.search(name) else None
    if layout is None:
        return {name: slice(0, out)}
    blocks, sizes = layout
    numbers = torch.arange(out).reshape(blocks, -1)
    found: dict[str, Rows] = {}
    start = 0
    for part, size in sizes.items():
        found[part] = slice(start, start + size)
        if blocks > 1:
            found[part] = numbers[:, start : start + size].flatten()
        start += size
    return {f"{name}[{part}]": found[part] for part in "qkv"}


def _layout(name: str, config: Any, out: int, width: int) -> tuple[int, dict[str, int]] | None:
    """Return how many equal blocks follow one another, and the rows of each part in a block."""
    kind = getattr(config, "model_type", "")
    heads = getattr(config, "num_attention_heads", 1)
    groups = getattr(config, "num_key_value_heads", None)
    if kind == "falcon" and config.new_decoder_architecture:
        blocks = config.num_kv_heads
        size = out // (heads + 2 * blocks)
        return blocks, {"q": heads // blocks * size, "k": size, "v": size}
    if kind in ("falcon", "gpt_bigcode") and config.multi_query:
        groups = 1
    elif kind in _BY_HEAD or kind in ("falcon", "gpt_bigcode"):
        return heads, dict.fromkeys("qkv", out // heads // 3)
    elif kind == "codegen":
        # Written for four accelerators, each with a share of the heads.
        return 4, dict.fromkeys("qvk", out // 12)
    elif name.endswith("query_key_value"):
        return None
    if out == 3 * width:
        return 1, dict.fromkeys("qkv", width)
    if groups is None:
        return None
    value = out // (heads + 2 * groups) * groups
    return 1, {"q": out - 2 * value, "k": value, "v": value}


def _shape(layer: Any) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    width, out = layer.weight.shape
    return out, width
