"""Text files line by line, with errors that name the file and the line; rows of a corpus."""

from __future__ import annotations

import codecs
import gzip
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal, cast

from fullrank.core.corpus import Corpus, check_id
from fullrank.core.errors import InputError

Errors = Literal["strict", "replace", "ignore"]
"""What to do with bytes that are not UTF-8, in Python's words."""


def find_file(path: str | Path) -> Path:
    """The file, or its compressed form ``path.gz``.

    Raises
    ------
    InputError
        When there is neither.
    """
    file = Path(path)
    if file.is_file():
        return file
    if (packed := file.with_name(file.name + ".gz")).is_file():
        return packed
    if file.is_dir():
        raise InputError(f"{file} is a folder; expected a file")
    raise InputError(f"there is no file {file} (nor {packed.name})")


def read_lines(path: str | Path, errors: Errors = "strict") -> Iterator[tuple[int, str]]:
    """Yield line numbers (from 1) and lines without their ends, one line in memory at a time.

    Parameters
    ----------
    path
        A UTF-8 text file, with or without a byte order mark; compressed when it ends in ``.gz``.
    errors
        ``"strict"`` refuses other bytes; ``"replace"`` puts U+FFFD for them.

    Raises
    ------
    InputError
        When the file is absent, not UTF-8, or a damaged archive.
    """
    file = find_file(path)
    number, offset = 0, 0
    try:
        with _open(file) as lines:
            for number, raw in enumerate(lines, 1):
                yield number, decode(raw, file, number, offset, errors).rstrip("\r\n")
                offset += len(raw)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(
            f"{file}, after line {number}: the archive is damaged or cut off ({error})"
        ) from error
    except PermissionError as error:
        raise InputError(f"{file} cannot be read: {error.strerror}") from error


def _open(file: Path) -> IO[bytes]:
    return cast("IO[bytes]", gzip.open(file)) if file.suffix == ".gz" else file.open("rb")


def decode(raw: bytes, file: Path, number: int, offset: int, errors: Errors) -> str:
    """Decode a line that starts ``offset`` bytes into a file, or say where it is not UTF-8."""
    start = len(codecs.BOM_UTF8) if number == 1 and raw.startswith(codecs.BOM_UTF8) else 0
    try:
        return raw[start:].decode("utf-8", errors)
    except UnicodeDecodeError as error:
        at = start + error.start
        raise InputError(
            f"{file}, line {number}: byte 0x{raw[at]:02x} at offset {offset + at} of the file is "
            "not UTF-8; convert the file, or pass errors='replace'"
        ) from None


class Rows:
    """Documents as they are read; every complaint names the file and the line.

    Parameters
    ----------
    path
        Where they come from.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        self.ids: dict[str, str] = {}
        """Document id -> where it was found."""
        self.texts: list[str] = []
        self.titles: list[str] = []
        self.metadata: list[Mapping[str, Any]] = []

    def add(
        self,
        identifier: object,
        text: object,
        title: object = "",
        metadata: Mapping[str, Any] | None = None,
        *,
        line: int | None = None,
        path: str | Path | None = None,
    ) -> None:
        """Add a document found on a line of a file; numbers are taken as ids, null as no title."""
        where = f"{path or self.path}" + (f", line {line}" if line is not None else "")
        name = id_at(identifier, "document", where)
        if (first := self.ids.setdefault(name, where)) is not where:
            raise InputError(f"{where}: document id {name!r} occurs twice, first in {first}")
        for what, value in (("text", text), ("title", title or "")):
            if not isinstance(value, str):
                kind = "null" if value is None else f"a {type(value).__name__}"
                raise InputError(f"{where}: the {what} of document {name!r} is {kind}, not text")
        self.texts.append(str(text))
        self.titles.append(str(title or ""))
        self.metadata.append(metadata or {})

    def corpus(self) -> Corpus:
        """Return the corpus of these rows.

        Raises
        ------
        InputError
            When there are none.
        """
        if not self.ids:
            raise InputError(f"{self.path} holds no documents")
        return Corpus(list(self.ids), self.texts, self.titles, self.metadata)


def id_at(identifier: object, what: str, where: str) -> str:
    """Return a valid id, whole numbers as their digits, or an error that says where it stands."""
    if isinstance(identifier, int) and not isinstance(identifier, bool):
        identifier = str(identifier)
    try:
        return check_id(identifier, what)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
