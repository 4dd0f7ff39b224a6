"""Layers by name: shell patterns, or parts of names."""

from __future__ import annotations

from fnmatch import fnmatchcase


def matches(name: str, pattern: str) -> bool:
    """Whether a pattern names a layer: as a shell pattern, or without a wildcard as a part.

    >>> matches("blocks.0.attn", "*.attn"), matches("blocks.0.attn", "tt"), matches("a", "*.a")
    (True, True, False)
    """
    wild = any(character in pattern for character in "*?[")
    return fnmatchcase(name, pattern) if wild else pattern in name
