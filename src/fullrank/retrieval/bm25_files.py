"""A BM25 index on disk: numpy arrays and JSON, nothing that could be code."""

from __future__ import annotations

import io
import json
import secrets
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fullrank.core.errors import InputError, StoreError, require
from fullrank.core.files import atomic_write, sha256_file, sync_folder

_FORMAT = 1
_MANIFEST = "bm25.json"
_ARRAYS = ("data", "indices", "indptr")
_SETTINGS = {"method", "k1", "b", "stopwords", "stemmer", "corpus"}


def write(folder: Path, settings: Mapping[str, Any], ids: Sequence[str], engine: Any) -> Path:
    """Write an index under a temporary name, then put it into place.

    Parameters
    ----------
    folder
        Absent, empty, or an index, which is replaced.
    settings
        JSON values that :func:`read` gives back.
    ids
        Document ids, in the order of the rows.
    engine
        A bm25s index, or None when no document holds a token.
    """
    if folder.exists() and not (folder / _MANIFEST).is_file() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty and no BM25 index; give another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    retired = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}")
    temporary.mkdir()
    try:
        files = _write_files(temporary, ids, engine)
        manifest = {"format": _FORMAT, **settings, "empty": engine is None, "files": files}
        atomic_write(temporary / _MANIFEST, json.dumps(manifest, indent=1).encode())
        if folder.exists():
            folder.rename(retired)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        if retired.exists() and not folder.exists():
            retired.rename(folder)
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(retired, ignore_errors=True)
    return folder


def _write_files(folder: Path, ids: Sequence[str], engine: Any) -> dict[str, str]:
    contents: dict[str, Any] = {"ids.json": list(ids)}
    if engine is not None:
        contents["vocabulary.json"] = engine.vocab_dict
        arrays = {name: engine.scores[name] for name in _ARRAYS}
        if engine.nonoccurrence_array is not None:
            arrays["nonoccurrence"] = engine.nonoccurrence_array
        for name, array in arrays.items():
            contents[f"{name}.npy"] = np.asarray(array)
    for name, content in contents.items():
        if isinstance(content, np.ndarray):
            buffer = io.BytesIO()
            np.save(buffer, content, allow_pickle=False)
            atomic_write(folder / name, buffer.getvalue())
        else:
            # Escaped, so that any string of Python's survives.
            atomic_write(folder / name, json.dumps(content).encode())
    return {name: sha256_file(folder / name) for name in contents}


def read(folder: Path) -> tuple[dict[str, Any], list[str], Any]:
    """Return settings, ids and engine (None for one without tokens), or raise StoreError."""
    manifest = _manifest(folder)
    for name, expected in manifest["files"].items():
        path = folder / Path(name).name
        if not path.is_file() or sha256_file(path) != expected:
            raise StoreError(f"{path} is absent or damaged; make the BM25 index again")
    try:
        ids = json.loads((folder / "ids.json").read_bytes())
        engine = None if manifest["empty"] else _engine(folder, manifest, len(ids))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{folder} cannot be read as a BM25 index: {error}") from error
    return {name: manifest[name] for name in _SETTINGS}, ids, engine


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    if not path.is_file():
        raise StoreError(f"{folder} is no BM25 index: there is no {_MANIFEST} in it")
    try:
        manifest = json.loads(path.read_bytes())
        version = int(manifest["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read: {error}") from error
    if version > _FORMAT:
        raise StoreError(
            f"{folder} was written by a newer fullrank (format {version}, known: {_FORMAT}); "
            "update fullrank"
        )
    if missing := (_SETTINGS | {"files", "empty"}) - set(manifest):
        raise StoreError(f"{path} lacks {sorted(missing)}; make the BM25 index again")
    return dict(manifest)


def _engine(folder: Path, manifest: Mapping[str, Any], documents: int) -> Any:
    library = require("bm25s", extra="search")
    engine = library.BM25(method=manifest["method"], k1=manifest["k1"], b=manifest["b"])
    engine.scores = {name: _array(folder, name) for name in _ARRAYS} | {"num_docs": documents}
    engine.vocab_dict = json.loads((folder / "vocabulary.json").read_bytes())
    engine.unique_token_ids_set = set(engine.vocab_dict.values())
    engine.nonoccurrence_array = (
        _array(folder, "nonoccurrence") if "nonoccurrence.npy" in manifest["files"] else None
    )
    return engine


def _array(folder: Path, name: str) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = np.load(folder / f"{name}.npy", allow_pickle=False)
    return array
