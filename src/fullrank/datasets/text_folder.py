"""A folder of plain text and Markdown files: one document a file."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from fullrank.core.corpus import Corpus
from fullrank.core.errors import InputError
from fullrank.datasets.reading import Errors, Rows, decode

SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")

_ATX = re.compile(r"#{1,6}[ \t]+(.+?)[ \t]*#*[ \t]*")
_UNDERLINE = re.compile(r"[ \t]*([=\-~^*])\1{2,}[ \t]*")
_FRONT_TITLE = re.compile(r"title:[ \t]*(['\"]?)(.+?)\1[ \t]*")
_FENCE = re.compile(r"[ \t]*(```|~~~)")


def text_folder(
    path: str | Path,
    *,
    suffixes: Collection[str] | None = SUFFIXES,
    errors: Errors = "strict",
) -> Corpus:
    """Read the text files under a folder, or a single one.

    A document's id is its path inside the folder, white space replaced by ``_`` because run files
    are divided by it: ``sub dir/my note.md`` becomes ``sub_dir/my_note.md``, and the path as it is
    is kept as the metadata field ``path``. Its title is the first heading (Markdown,
    reStructuredText, or ``title:`` in the front matter), else the file's name. Hidden files and
    folders, binary files (a zero byte near their start) and empty ones are passed over.

    Parameters
    ----------
    path
        The folder.
    suffixes
        Endings of the files to read, by default .txt, .text, .md, .markdown and .rst; None
        reads whatever is text.
    errors
        ``"replace"`` reads files that are not UTF-8 throughout.

    Raises
    ------
    InputError
        When there is nothing to read, a file is not UTF-8 (the message says at which byte), or
        two files get the same id.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "my notes.md").write_text("# Notes on rank")
    >>> corpus = text_folder(folder)
    >>> corpus.ids, corpus.titles
    (('my_notes.md',), ('Notes on rank',))
    """
    root = Path(path)
    if not root.exists():
        raise InputError(f"there is no folder {root}")
    rows = Rows(root)
    for file in _files(root, suffixes):
        try:
            data = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file} cannot be read: {error.strerror}") from error
        if b"\0" in data[:8192] or not data.strip():
            continue
        text = _decode(data, file, errors)
        name = file.relative_to(root).as_posix() if root.is_dir() else file.name
        rows.add(
            re.sub(r"\s+", "_", name),
            text,
            first_heading(text) or file.stem,
            {"path": name},
            path=file,
        )
    if not rows.ids:
        kinds = "text" if suffixes is None else ", ".join(sorted(suffixes))
        raise InputError(f"{root} holds no documents: no non-empty {kinds} file that is not hidden")
    return rows.corpus()


def _files(root: Path, suffixes: Collection[str] | None) -> Iterator[Path]:
    if root.is_file():
        yield root
        return
    for file in sorted(root.rglob("*")):
        if any(part.startswith(".") for part in file.relative_to(root).parts):
            continue
        if file.is_file() and (suffixes is None or file.suffix.lower() in suffixes):
            yield file


def _decode(data: bytes, file: Path, errors: Errors) -> str:
    """Decode a whole file; only when that fails, look for the line."""
    try:
        return data.decode("utf-8", errors).removeprefix("\ufeff").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        start = data.rfind(b"\n", 0, error.start) + 1
        number = data.count(b"\n", 0, error.start) + 1
        return decode(data[start:], file, number, start, errors)


def first_heading(text: str) -> str:
    r"""Title of a document: its first heading, empty when it has none.

    >>> first_heading("---\ntitle: From the front\n---\nText")
    'From the front'
    >>> first_heading("Underlined\n==========\nText"), first_heading("Just text")
    ('Underlined', '')
    """
    front = fenced = False
    before = ""
    # A title stands near the start; a long file is not searched to its end.
    for number, line in enumerate(text[:20_000].splitlines()):
        if line.strip() == "---" and (number == 0 or front):
            front = number == 0
            before = ""
        elif front:
            if found := _FRONT_TITLE.fullmatch(line):
                return found[2]
        elif _FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            if found := _ATX.fullmatch(line):
                return found[1]
            if before and _UNDERLINE.fullmatch(line) and before != "---":
                return before
            before = "" if _UNDERLINE.fullmatch(line) else line.strip()
    return ""
