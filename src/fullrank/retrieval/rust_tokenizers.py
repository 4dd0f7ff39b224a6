"""Copies of a model's fast tokenizer that cut where this package wants them to."""

from __future__ import annotations

from typing import Any


def rust_tokenizer(tokenizer: Any, max_tokens: int | None = None) -> Any:
    """Return a copy of a model's Rust tokenizer without padding, or None where it has none.

    Parameters
    ----------
    tokenizer
        A transformers tokenizer; it is not changed.
    max_tokens
        Where texts are cut, special tokens included; nowhere by default.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    own = type(backend).from_str(backend.to_str())
    own.no_padding()
    if max_tokens is None:
        own.no_truncation()
    else:
        own.enable_truncation(max_tokens)
    return own
