"""What tells one encoder's vectors from another's: hashes of a model, and signs of its change."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from fullrank.retrieval.rust_tokenizers import rust_tokenizer


def weight_state(model: Any) -> tuple[tuple[int, int], ...]:
    """Where each weight is, and how often it was written to."""
    return tuple((p.data_ptr(), 0 if p.is_inference() else p._version) for p in model.parameters())


def described(model: Any, settings: list[Any]) -> Any:
    """Return a hash of all that decides a model's vectors but its weights."""
    if (cut := model.truncate_dim) is not None:
        settings = [*settings, cut]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for module in model:
        described: Any = getattr(module, "get_config_dict", dict)()
        digest.update(f"{type(module).__name__}{described!r}".encode())
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    if config is not None:
        known = {
            k: v
            for k, v in config.to_dict().items()
            if k not in ("_name_or_path", "transformers_version", "dtype")
        }
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    if (tokenizer := rust_tokenizer(model.tokenizer, 8)) is not None:
        digest.update(tokenizer.to_str().encode())
    return digest


def content_hash(model: Any, settings: list[Any]) -> str:
    """SHA-256 of all that decides a model's vectors, under some settings."""
    import torch

    digest: Any = described(model, settings)
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        # Viewed as bytes: numpy has no bfloat16.
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return str(digest.hexdigest())
