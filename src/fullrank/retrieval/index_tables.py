"""The tables of an index, in LanceDB: its documents, and the passages that each encoder saw."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Corpus
from fullrank.core.errors import InputError, require
from fullrank.retrieval.index_store import reading
from fullrank.retrieval.passages import Passages

Digests: TypeAlias = npt.NDArray[np.uint8]
"""``(P, 16)``: what tells whether a passage's text was encoded before, a row a passage."""

LANCE = "lance"
DOCUMENTS = "documents"
# Metadata fields become columns of this prefix, for filters, where their values are of one type.
_META = "meta_"
# The names of tables' columns are read as expressions: other fields are there by their UTF-8.
_CODED = "utf8_"
_PASSAGE = ("document", "start", "stop", "lead")
_FIELD = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")
_ERRNO = re.compile(r"\(os error (\d+)\)")
# Rows handed to LanceDB at once, so that vectors stream from disk to disk.
_BATCH = 8192


def write_documents(folder: Path, corpus: Corpus) -> None:
    """Write the documents of a generation.

    Raises
    ------
    InputError
        When a text is no valid Unicode, or a document's metadata is nothing that JSON can hold.
    OSError
        When they cannot be written.
    """
    pa = require("pyarrow", extra="search")
    columns = {
        "row": pa.array(np.arange(len(corpus), dtype=np.int64)),
        "id": _strings(corpus, corpus.ids, "id"),
        "title": _strings(corpus, corpus.titles, "title"),
        "text": _strings(corpus, corpus.texts, "text"),
        "metadata": _strings(corpus, _metadata_json(corpus), "metadata"),
    }
    for name in dict.fromkeys(f for m in corpus.metadata for f in m):
        column = _filter_column([m.get(name) for m in corpus.metadata])
        if column is not None:
            columns[_column(str(name))] = column
    with _lance_errors():
        _connect(folder).create_table(DOCUMENTS, pa.table(columns))


def _column(field: str) -> str:
    if _FIELD.fullmatch(field):
        return _META + field
    return _CODED + field.encode("utf-8", "surrogatepass").hex()


def _field(column: str) -> str | None:
    """Undo :func:`_column`; None for what is no field."""
    if column.startswith(_CODED):
        return bytes.fromhex(column.removeprefix(_CODED)).decode("utf-8", "surrogatepass")
    return column.removeprefix(_META) if column.startswith(_META) else None


def read_documents(folder: Path) -> Corpus:
    """Read the documents of a generation, in order."""
    table = _read(folder, DOCUMENTS, ["row", "id", "title", "text", "metadata"])
    ids, titles, texts, metadata = (table[c].to_pylist() for c in table.column_names[1:])
    return Corpus(ids, texts, titles, [json.loads(m) if m != "{}" else {} for m in metadata])


class StoredCorpus(Corpus):
    """The documents of a generation, read when they are first looked at.

    Parameters
    ----------
    folder
        Of the generation.
    hold
        Anything that keeps the folder there until then.
    """

    _COLUMNS = frozenset({"ids", "texts", "titles", "metadata", "_row"})

    def __init__(self, folder: Path, hold: object = None) -> None:
        self._folder, self._hold, self._lock = folder, hold, threading.Lock()

    def __getattr__(self, name: str) -> Any:
        # Called for what is not there yet.
        if name not in self._COLUMNS:
            raise AttributeError(f"a Corpus has no attribute {name!r}")
        with self._lock:
            if name not in self.__dict__:
                with reading(self._folder, "the documents"):
                    self.__dict__.update(vars(read_documents(self._folder)))
                self._hold = None
        return self.__dict__[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return Corpus, (self.ids, self.texts, self.titles, self.metadata)


def read_filter_column(folder: Path, field: str) -> Any:
    """Read one metadata field as an Arrow column, a value (or null) for each document.

    Raises
    ------
    InputError
        When no document has such a field, or its values cannot be compared.
    """
    names = _connect(folder).open_table(DOCUMENTS).schema.names
    if _column(field) not in names:
        known = [found for found in map(_field, names) if found is not None]
        raise InputError(
            f"documents cannot be filtered by {field!r}: no such metadata field with values of one "
            f"type; there is {', '.join(map(repr, known)) or 'none'}"
        )
    return _read(folder, DOCUMENTS, ["row", _column(field)])[_column(field)].combine_chunks()


def write_passages(
    folder: Path,
    encoder: str,
    corpus: Corpus,
    passages: Passages,
    digests: Digests,
    vectors: npt.NDArray[np.float32],
) -> None:
    """Write the passages of one encoder with their vectors ``(P, d)``, in batches.

    Raises
    ------
    OSError
        When they cannot be written.
    """
    pa = require("pyarrow", extra="search")
    dimension = vectors.shape[1]
    lead = np.zeros_like(passages.start) if passages.lead is None else passages.lead
    schema = pa.schema(
        {
            "row": pa.int64(),
            "document": pa.int64(),
            "id": pa.large_string(),
            "start": pa.int64(),
            "stop": pa.int64(),
            "lead": pa.int64(),
            "digest": pa.binary(digests.shape[1]),
            "vector": pa.list_(pa.float32(), dimension),
        }
    )

    def batches() -> Iterator[Any]:
        for begin in range(0, len(vectors), _BATCH):
            part = slice(begin, begin + _BATCH)
            flat = np.ascontiguousarray(vectors[part]).reshape(-1)
            columns = [
                pa.array(np.arange(begin, begin + len(vectors[part]), dtype=np.int64)),
                pa.array(passages.document[part]),
                pa.array([corpus.ids[r] for r in passages.document[part]], pa.large_string()),
                pa.array(passages.start[part]),
                pa.array(passages.stop[part]),
                pa.array(lead[part]),
                pa.array([d.tobytes() for d in digests[part]], schema.field("digest").type),
                pa.FixedSizeListArray.from_arrays(pa.array(flat), dimension),
            ]
            yield pa.record_batch(columns, schema=schema)

    with _lance_errors():
        reader = pa.RecordBatchReader.from_batches(schema, batches())
        _connect(folder).create_table(_table_name(encoder), reader)


def read_passages(folder: Path, encoder: str) -> tuple[Passages, Digests]:
    """Read the passages of one encoder, without their vectors."""
    table = _read(folder, _table_name(encoder), ["row", *_PASSAGE, "digest"])
    digests = np.frombuffer(b"".join(table["digest"].to_pylist()), dtype=np.uint8)
    return (
        Passages(*(table[column].to_numpy() for column in _PASSAGE)),
        digests.reshape(len(table), -1),
    )


def _table_name(encoder: str) -> str:
    return f"passages-{encoder}"


def _connect(folder: Path) -> Any:
    return require("lancedb", extra="search").connect(str(folder / LANCE))


def _read(folder: Path, table: str, columns: list[str]) -> Any:
    """Read columns, of which the first is the rows' numbers, in the order of these."""
    with _lance_errors():
        found = _connect(folder).open_table(table).search().select(columns).to_arrow()
    if not np.array_equal(found["row"].to_numpy(), np.arange(len(found))):
        found = found.sort_by("row")  # a scan promises no order
    return found


@contextmanager
def _lance_errors() -> Iterator[None]:
    """Turn what LanceDB raises when the system refuses into the OSError that it was."""
    try:
        yield
    except RuntimeError as error:
        if (code := _ERRNO.search(str(error))) is None:
            raise
        raise OSError(int(code[1]), str(error)) from error


def _strings(corpus: Corpus, values: Sequence[str], what: str) -> Any:
    pa = require("pyarrow", extra="search")
    try:
        return pa.array(values, pa.large_string())
    except UnicodeEncodeError:
        for identifier, value in zip(corpus.ids, values, strict=True):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise InputError(
                    f"document {identifier!r}: its {what} is no valid Unicode at character "
                    f"{error.start}; read files with errors='replace'"
                ) from None
        raise


def _metadata_json(corpus: Corpus) -> list[str]:
    encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False).encode
    out = []
    for identifier, metadata in zip(corpus.ids, corpus.metadata, strict=True):
        try:
            out.append(encode(dict(metadata)) if metadata else "{}")
        except (TypeError, ValueError) as error:
            raise InputError(
                f"document {identifier!r}: its metadata cannot be stored as JSON ({error}); "
                "use strings, finite numbers, booleans, None, lists and dicts of them"
            ) from None
    return out


def _filter_column(values: list[Any]) -> Any:
    """Return an Arrow column when all values are of one type that can be compared, or None."""
    pa = require("pyarrow", extra="search")
    kinds = {type(value) for value in values if value is not None}
    types: Mapping[frozenset[type], Any] = {
        frozenset({bool}): pa.bool_(),
        frozenset({int}): pa.int64(),
        frozenset({float}): pa.float64(),
        frozenset({int, float}): pa.float64(),
        frozenset({str}): pa.large_string(),
    }
    kind = types.get(frozenset(kinds))
    if kinds <= {list, tuple} and all(isinstance(i, str) for v in values if v for i in v):
        kind = pa.list_(pa.large_string()) if kinds else None
    try:
        return None if kind is None else pa.array(values, kind)
    except (pa.ArrowInvalid, OverflowError, UnicodeEncodeError):  # e.g. an integer past 64 bits
        return None
