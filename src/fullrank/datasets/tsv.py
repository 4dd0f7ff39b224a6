"""Tab-separated values: one document a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fullrank.core.corpus import Corpus
from fullrank.core.errors import InputError
from fullrank.datasets.jsonl import ID_FIELDS
from fullrank.datasets.reading import Errors, Rows, find_file, read_lines

_BY_WIDTH = {2: ("id", "text"), 3: ("id", "title", "text")}


def tsv(
    path: str | Path,
    *,
    columns: Sequence[str] | None = None,
    errors: Errors = "strict",
) -> Corpus:
    r"""Read a corpus from tab-separated lines; there is no quoting, as in MS MARCO's files.

    Parameters
    ----------
    path
        The file; compressed when it ends in ``.gz``.
    columns
        What the columns are, with ``"id"`` and ``"text"`` among them and perhaps ``"title"``;
        others become metadata. By default the first line, when it holds such names, else
        ``id, text`` or ``id, title, text`` by their number.
    errors
        ``"replace"`` reads a file that is not UTF-8 throughout.

    Raises
    ------
    InputError
        On a line with another number of columns, a bad or a repeated id: the message names the
        file and the line. Empty lines are passed over.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "docs.tsv"
    >>> _ = file.write_text("1\tfirst text\n2\tsecond text\n")
    >>> list(tsv(file).texts)
    ['first text', 'second text']
    """
    file = find_file(path)
    rows = Rows(file)
    names = None if columns is None else _checked(columns)
    for number, line in read_lines(file, errors):
        if not line.strip():
            continue
        cells = line.split("\t")
        if names is None:
            names = header(cells)
            if names is not None:
                continue
            names = _BY_WIDTH.get(len(cells))
            if names is None:
                raise InputError(
                    f"{file}, line {number}: {len(cells)} tab-separated columns; expected 2 "
                    "(id, text), 3 (id, title, text) or a header; name them with columns="
                )
        row = by_name(names, cells, f"{file}, line {number}")
        rows.add(row.pop("id"), row.pop("text"), row.pop("title", ""), row, line=number)
    return rows.corpus()


def _checked(columns: Sequence[str]) -> tuple[str, ...]:
    if not {"id", "text"} <= set(columns) or len(set(columns)) != len(columns):
        raise InputError(
            f"columns={list(columns)}; expected different names with 'id' and 'text' among them"
        )
    return tuple(columns)


def header(
    cells: Sequence[str], ids: Sequence[str] = ID_FIELDS, texts: Sequence[str] = ("text",)
) -> tuple[str, ...] | None:
    """Column names, ``id`` and ``text`` among them, when the first line is made of such."""
    names = [cell.strip().lower() for cell in cells]
    identifier, text = (next((n for n in known if n in names), None) for known in (ids, texts))
    if identifier is None or text is None or len(set(names)) != len(names):
        return None
    renamed = {identifier: "id", text: "text"}
    return tuple(renamed.get(name, name) for name in names)


def by_name(names: Sequence[str], cells: Sequence[str], where: str) -> dict[str, str]:
    """Cells of a line by the names of their columns."""
    if len(cells) != len(names):
        raise InputError(
            f"{where}: {len(cells)} tab-separated columns, expected "
            f"{len(names)} ({', '.join(names)})"
        )
    return dict(zip(names, cells, strict=True))
