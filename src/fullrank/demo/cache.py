"""What a second run of the demo does not compute again: embeddings, statistics and weights."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fullrank._version import __version__
from fullrank.core.files import atomic_write

Vectors = npt.NDArray[np.float32]


class Cache:
    """Arrays by the hash of everything they were computed from; names for other entries.

    An entry appears whole or not at all, and one that cannot be read is made again.

    Parameters
    ----------
    folder
        Where entries are kept; None keeps nothing.

    Examples
    --------
    >>> import tempfile
    >>> cache = Cache(Path(tempfile.mkdtemp()))
    >>> key = cache.key("ones", 2)
    >>> cache.array(key, lambda: np.ones((2, 3), np.float32)).shape
    (2, 3)
    >>> cache.array(key, lambda: 1 / 0).sum().item()
    6.0
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.hits = 0

    def key(self, *parts: Any) -> str:
        """Hash JSON values, and this package's version, into a name for an entry."""
        text = json.dumps([__version__, *parts], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def path(self, *parts: Any) -> Path:
        """Return where an entry of tensors is kept that comes from these JSON values."""
        assert self.folder is not None
        return self.folder / f"{self.key(*parts)}.safetensors"

    def array(self, key: str, make: Callable[[], Vectors]) -> Vectors:
        """Return the array of that key, made now if it is not there."""
        if self.folder is None:
            return make()
        path = self.folder / f"{key}.npy"
        try:
            found: Vectors = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError):
            made = make()
            buffer = io.BytesIO()
            np.save(buffer, made, allow_pickle=False)
            atomic_write(path, buffer.getvalue())
            return made
        self.hits += 1
        return found
