"""JSON lines: one document a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fullrank.core.corpus import Corpus
from fullrank.core.errors import InputError
from fullrank.datasets.reading import Errors, Rows, find_file, read_lines

ID_FIELDS = ("_id", "id", "doc_id", "docno", "docid")


def jsonl(
    path: str | Path,
    *,
    id_field: str | None = None,
    text_field: str = "text",
    title_field: str = "title",
    errors: Errors = "strict",
) -> Corpus:
    r"""Read a corpus from a file with a JSON object on each line, e.g. ``{"id": "1", "text": ..}``.

    Parameters
    ----------
    path
        The file; compressed when it ends in ``.gz``.
    id_field
        Key of the id; by default the first there is of ``_id``, ``id``, ``doc_id``, ``docno``
        and ``docid``.
    text_field, title_field
        Keys of the text (must be there) and of the title (may be absent or null). All other
        keys become metadata; an object under ``metadata`` is merged into it.
    errors
        ``"replace"`` reads a file that is not UTF-8 throughout.

    Raises
    ------
    InputError
        On a line that is no JSON object, lacks its id or text, or repeats an id: the message
        names the file and the line. Empty lines are passed over.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "docs.jsonl"
    >>> _ = file.write_text('{"id": 7, "title": "Seven", "text": "A number.", "lang": "en"}\n')
    >>> jsonl(file)["7"]
    Document(id='7', text='A number.', title='Seven', metadata={'lang': 'en'})
    """
    file = find_file(path)
    rows = Rows(file)
    for number, record in read_objects(file, errors):
        where = f"{file}, line {number}"
        key = id_field or find_id_field(record, where)
        for name, what in ((key, "id_field"), (text_field, "text_field")):
            if name not in record:
                raise InputError(
                    f"{where}: no {name!r} among the keys {sorted(record)}; "
                    f"name the right one with {what}="
                )
        rest = {k: v for k, v in record.items() if k not in (key, text_field, title_field)}
        if isinstance(inner := rest.get("metadata"), Mapping):
            rest = {**rest, **inner}
            del rest["metadata"]
        rows.add(record[key], record[text_field], record.get(title_field), rest, line=number)
    return rows.corpus()


def read_objects(path: Path, errors: Errors = "strict") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line numbers and JSON objects of a file, passing over empty lines.

    Raises
    ------
    InputError
        On a line that is not a JSON object.
    """
    for number, line in read_lines(path, errors):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(
                f"{path}, line {number}: not JSON ({error.msg}, column {error.colno}): {_cut(line)}"
            ) from None
        except (ValueError, RecursionError) as error:  # An endless number; brackets in brackets.
            raise InputError(f"{path}, line {number}: cannot be read as JSON: {error}") from None
        if not isinstance(record, dict):
            raise InputError(
                f"{path}, line {number}: expected an object like "
                f'{{"id": "1", "text": "..."}}, found {_cut(line)}'
            )
        yield number, record


def find_id_field(record: Mapping[str, Any], where: str) -> str:
    """The key that holds the id."""
    for name in ID_FIELDS:
        if name in record:
            return name
    raise InputError(
        f"{where}: none of the keys {sorted(record)} is an id ({', '.join(ID_FIELDS)}); "
        "name it with id_field="
    )


def _cut(line: str) -> str:
    return repr(line if len(line) <= 60 else line[:57] + "...")
