"""Vectors of an index: encoded once, kept by content, searched from a memory map."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError, require
from fullrank.core.files import atomic_write
from fullrank.core.progress import progress as progress_bar
from fullrank.retrieval.index_tables import Digests

Vectors = npt.NDArray[np.float32]

# What an interruption may cost: texts encoded since the last chunk was written. Chunks grow with
# the work, so that there are not many files.
_CHUNK, _LARGEST_CHUNK, _CHUNKS = 512, 16_384, 64
_DIGEST = 16
# Vectors copied at once.
_ROWS = 8192


def text_digests(key: str, texts: Sequence[str | bytes]) -> Digests:
    """Return ``(len(texts), 16)`` digests of texts as one encoder sees them.

    Parameters
    ----------
    key
        Of the encoder: see :attr:`fullrank.retrieval.Encoder.key`.
    texts
        What is encoded, without the encoder's prompt, which its key covers.

    Examples
    --------
    >>> text_digests("k", ["a", "b", "a"]).shape
    (3, 16)
    """
    start = hashlib.sha256(key.encode() + b"\0")
    out = np.empty((len(texts), _DIGEST), dtype=np.uint8)
    for row, text in enumerate(texts):
        digest = start.copy()
        digest.update(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
        out[row] = np.frombuffer(digest.digest()[:_DIGEST], dtype=np.uint8)
    return out


class VectorSource:
    """Vectors that are there already, found by digest: stored ones, or those of a cache."""

    def __init__(self, parts: Iterable[tuple[Digests, Vectors]] = ()) -> None:
        self._where: dict[bytes, tuple[Vectors, int]] = {}
        for digests, vectors in parts:
            self.include(digests, vectors)

    def include(self, digests: Digests, vectors: Vectors) -> None:
        """Know these too; the vectors are referred to, not copied."""
        for row, digest in enumerate(digests):
            self._where[digest.tobytes()] = (vectors, row)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._where

    def __getitem__(self, digest: bytes) -> Vectors:
        vectors, row = self._where[digest]
        return np.asarray(vectors[row])


class VectorCache:
    """A folder of encoded texts, in chunks that are written whole or not at all.

    Parameters
    ----------
    folder
        Made when the first chunk is written.
    key
        Of the encoder: each has a folder of its own inside.
    dimension
        Length d of a vector.
    """

    def __init__(self, folder: Path, key: str, dimension: int) -> None:
        self.folder = folder / key[:24]
        self._type = np.dtype([("digest", "u1", (_DIGEST,)), ("vector", "<f4", (dimension,))])

    def read_into(self, source: VectorSource) -> None:
        """Let a source know what is here; a file that cannot be read counts as not there."""
        for path in sorted(self.folder.glob("*.npy")):
            with suppress(OSError, ValueError):
                chunk = _map_closed(path)
                if chunk.dtype == self._type and chunk.ndim == 1:
                    source.include(np.asarray(chunk["digest"]), chunk["vector"])

    def put(self, digests: Digests, vectors: Vectors) -> Vectors:
        """Keep a chunk, and return its vectors as they lie in the file, mapped."""
        chunk = np.empty(len(digests), dtype=self._type)
        chunk["digest"], chunk["vector"] = digests, vectors
        data = io.BytesIO()
        np.save(data, chunk, allow_pickle=False)
        name = hashlib.sha256(digests.tobytes()).hexdigest()[:24]
        path = atomic_write(self.folder / f"{name}.npy", data.getvalue())
        kept: Vectors = _map_closed(path)["vector"]
        return kept

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)


def _map_closed(path: Path) -> npt.NDArray[Any]:
    """Map a ``.npy`` file without keeping it open: a cache may have more than may be open."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        begin = file.tell()
    with require("pyarrow", extra="search").memory_map(str(path)) as mapped:
        content = mapped.read_buffer()
    array: npt.NDArray[Any] = np.frombuffer(content, dtype, offset=begin).reshape(shape)
    return array


def encode_missing(
    encoder: Any,
    texts: Sequence[str],
    digests: Digests,
    source: VectorSource,
    cache: VectorCache,
    *,
    progress: bool = True,
    label: str = "encode",
) -> int:
    """Encode the texts that the source does not know, chunk by chunk, into cache and source.

    An interruption costs at most one chunk. Equal texts are encoded once.

    Returns
    -------
    int
        How many texts were encoded.
    """
    first: dict[bytes, int] = {}
    for row, digest in enumerate(digests):
        if (key := digest.tobytes()) not in source:
            first.setdefault(key, row)
    rows = list(first.values())
    size = min(max(_CHUNK, len(rows) // _CHUNKS), _LARGEST_CHUNK)
    with progress_bar(label, len(rows), progress and bool(rows), unit="passages") as advance:
        for begin in range(0, len(rows), size):
            part = rows[begin : begin + size]
            vectors = encoder.encode([texts[row] for row in part], kind="document")
            source.include(digests[part], cache.put(digests[part], vectors))
            advance(len(part))
    return len(rows)


def write_vectors(path: Path, digests: Digests, source: VectorSource, dimension: int) -> Vectors:
    """Write the vectors of these digests as one ``.npy`` file, and map it.

    The file grows by ordinary writes: written through a map, a full disk would end the process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(digests), dimension)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for begin in range(0, len(digests), _ROWS):
            part = [source[digest.tobytes()] for digest in digests[begin : begin + _ROWS]]
            file.write(np.ascontiguousarray(np.stack(part), dtype="<f4").tobytes())
    return map_vectors(path)


def map_vectors(path: Path) -> Vectors:
    """Map a file of vectors, read-only."""
    vectors: Vectors = np.load(path, mmap_mode="r", allow_pickle=False)
    return vectors


def given_vectors(name: str, vectors: Any, documents: int, dimension: int | None) -> Vectors:
    """Return vectors given from outside as float32 unit vectors, or say what is wrong with them.

    Raises
    ------
    InputError
        Unless they are a finite ``(documents, d)`` array of numbers.
    """
    array = np.asarray(vectors)
    if array.ndim != 2 or len(array) != documents or not array.shape[1]:
        raise InputError(
            f"the vectors of {name!r} have shape {array.shape}; expected a row for each of "
            f"{documents} documents"
        )
    if dimension is not None and array.shape[1] != dimension:
        raise InputError(
            f"the vectors of {name!r} have length {array.shape[1]}, its encoder's {dimension}"
        )
    if array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        raise InputError(f"the vectors of {name!r} hold something that is not a finite number")
    out = array.astype(np.float32)
    return np.asarray(out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12))
