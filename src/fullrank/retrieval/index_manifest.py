"""What an index folder says about itself: `manifest.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fullrank._version import __version__
from fullrank.core.errors import StoreError
from fullrank.core.files import atomic_write

MANIFEST = "manifest.json"
FORMAT = "fullrank-index"
VERSION = 1


class DamagedIndexError(StoreError):
    """An index of which something is missing or is not what was written."""

    def __init__(self, folder: Path, reason: str) -> None:
        super().__init__(
            f"the index {folder} is damaged: {reason}; restore it from a copy, or create it "
            "again into the same folder"
        )


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True)


class FileRecord(_Part):
    """Size and checksum of one file of a generation."""

    size: int
    sha256: str


class EncoderRecord(_Part):
    """An encoder whose vectors are stored, and where its model is.

    Where depends on ``home``: under the ``"name"`` that ``model`` is, in the ``"folder"`` that it
    is the path of (relative to the index when inside or beside it), or ``"inside"`` the
    generation, as a copy of what was only in memory.
    """

    model: str
    home: Literal["name", "folder", "inside"]
    key: str
    dimension: int
    dtype: str
    max_tokens: int
    query_prompt: str = ""
    document_prompt: str = ""


class Settings(_Part):
    """How the systems of an index are put together; none of it touches what is stored.

    Parameters
    ----------
    depth
        Documents that each retriever hands on.
    rrf_k
        The constant of reciprocal rank fusion.
    weights
        Of BM25 and of the encoder, in the weighted fusion.
    feedback_first, feedback_weight, feedback_documents, feedback_weighting
        Of the pseudo-query: what ranks before it, then as ``weight``, ``feedback`` and
        ``weighting`` of :class:`~fullrank.retrieval.PseudoQueryReranker`.
    default_system
        Which system answers when none is asked for; None picks the reciprocal rank fusion.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    depth: int = Field(default=100, ge=1)
    rrf_k: float = Field(default=60, gt=0)
    weights: tuple[float, float] = (0.5, 0.5)
    feedback_first: Literal["dense", "rrf", "weighted"] = "rrf"
    feedback_weight: float = Field(default=0.3, ge=0)
    feedback_documents: int = Field(default=5, ge=1)
    feedback_weighting: Literal["uniform", "rank", "softmax"] = "uniform"
    default_system: str | None = None


class Manifest(_Part):
    """The state of an index: which generation is the current one, and what is in it."""

    format: Literal["fullrank-index"] = "fullrank-index"
    version: int = VERSION
    written_by: str = __version__
    written_at: str = ""
    generation: int = Field(ge=1)
    documents: int = Field(ge=1)
    bm25: dict[str, Any] = {}
    encoders: dict[str, EncoderRecord] = {}
    settings: Settings = Settings()
    files: dict[str, FileRecord] = {}


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Make a generation the current one, in one step."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    stamped = manifest.model_copy(update={"written_at": now, "written_by": __version__})
    body = stamped.model_dump(mode="json")
    text = json.dumps({**body, "checksum": _checksum(body)}, indent=1, ensure_ascii=False)
    atomic_write(folder / MANIFEST, text.encode())
    return stamped


def read_manifest(folder: Path) -> Manifest:
    """Read and check a manifest.

    Raises
    ------
    StoreError
        When the folder is absent or no index, when a newer version wrote it, or when the
        manifest is damaged.
    """
    try:
        data = json.loads((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise StoreError(_no_index(folder)) from None
    except OSError as error:
        raise StoreError(f"cannot read {folder / MANIFEST}: {error}") from error
    except ValueError:
        raise DamagedIndexError(folder, f"{MANIFEST} is no valid JSON") from None
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise StoreError(f"{folder} is no fullrank index: its {MANIFEST} is of something else")
    version = data.get("version")
    if isinstance(version, int) and version > VERSION:
        raise StoreError(
            f"{folder} was written by a newer fullrank ({data.get('written_by', 'unknown')}, "
            f"index format {version}); this one reads up to format {VERSION}: upgrade fullrank"
        )
    body = {key: value for key, value in data.items() if key != "checksum"}
    if data.get("checksum") != _checksum(body):
        raise DamagedIndexError(folder, f"{MANIFEST} is not what was written")
    try:
        return Manifest.model_validate(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DamagedIndexError(folder, f"{MANIFEST}, {where}: {first['msg']}") from error


def _no_index(folder: Path) -> str:
    if not folder.exists():
        return f"there is no index at {folder}: no such folder; create one there first"
    if not folder.is_dir():
        return f"{folder} is a file; an index is a folder with a {MANIFEST}"
    if (folder / "index" / MANIFEST).is_file():
        return f"{folder} is no index, but {folder / 'index'} is one: give that folder"
    if (folder / "generations").is_dir():
        return f"indexing into {folder} was not finished; run it again, it continues"
    return f"{folder} is no fullrank index: it has no {MANIFEST}"


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
