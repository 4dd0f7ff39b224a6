"""Query files in the forms they come in: JSON lines, tab-separated, TREC topics, one a line."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path

from fullrank.core.errors import InputError
from fullrank.datasets.jsonl import ID_FIELDS, read_objects
from fullrank.datasets.reading import Errors, find_file, id_at, read_lines
from fullrank.datasets.topics import read_topics
from fullrank.datasets.tsv import by_name, header

QUERY_ID_FIELDS = (*ID_FIELDS[:2], "query_id", "qid", *ID_FIELDS[2:])
_TEXT_FIELDS = ("text", "query")


def read_queries(path: str | Path, *, errors: Errors = "strict") -> dict[str, str]:
    r"""Read queries; the form is told from the first line that is not empty.

    Parameters
    ----------
    path
        JSON lines with ``_id``, ``id``, ``query_id`` or ``qid``, and ``text`` or ``query``; TREC
        topics (``<top>``, ``<topic>``); lines of an id, a tab and a text, or of columns that the
        first line names like that; or one query a line, whose ids are the line numbers.
        Compressed when it ends in ``.gz``.
    errors
        ``"replace"`` reads a file that is not UTF-8 throughout.

    Returns
    -------
    dict
        Query id -> text, in the file's order.

    Raises
    ------
    InputError
        On an empty or repeated query, or a line of another form: the message names the line.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "queries.tsv"
    >>> _ = file.write_text("q1\tsupersonic flow\n")
    >>> read_queries(file)
    {'q1': 'supersonic flow'}
    """
    file = find_file(path)
    first = next((line for _, line in read_lines(file, errors) if line.strip()), "")
    if first.lstrip().startswith("<"):
        return read_topics(file, errors=errors)
    if first.lstrip().startswith("{"):
        return collect_queries(query_objects(file, errors), file)
    if (names := header(first.split("\t"), QUERY_ID_FIELDS, _TEXT_FIELDS)) is not None:
        return collect_queries(_from_columns(file, names, errors), file)
    return collect_queries(_from_lines(file, "\t" in first, errors), file)


def query_objects(file: Path, errors: Errors) -> Iterator[tuple[int, object, object]]:
    """Line, id and text of queries in JSON lines."""
    for number, record in read_objects(file, errors):
        key = next((name for name in QUERY_ID_FIELDS if name in record), None)
        if key is None:
            raise InputError(
                f"{file}, line {number}: none of the keys {sorted(record)} is the id of a query "
                f"({', '.join(QUERY_ID_FIELDS)})"
            )
        text = next((record[name] for name in _TEXT_FIELDS if name in record), None)
        yield number, record[key], text


def _from_columns(
    file: Path, names: Sequence[str], errors: Errors
) -> Iterator[tuple[int, object, object]]:
    lines = ((number, line) for number, line in read_lines(file, errors) if line.strip())
    next(lines)
    for number, line in lines:
        row = by_name(names, line.split("\t"), f"{file}, line {number}")
        yield number, row["id"], row["text"]


def _from_lines(file: Path, tabs: bool, errors: Errors) -> Iterator[tuple[int, object, object]]:
    for number, line in read_lines(file, errors):
        if not line.strip():
            continue
        identifier, tab, text = line.partition("\t")
        if tabs and not tab:
            raise InputError(f"{file}, line {number}: expected an id, a tab and a query")
        yield number, identifier if tabs else str(number), text if tabs else line


def collect_queries(
    found: Iterable[tuple[int, object, object]],
    path: str | Path,
    judged: Container[str] | None = None,
) -> dict[str, str]:
    """Queries from (line, id, text), checked; where these are given, the judged ones only."""
    queries: dict[str, str] = {}
    for number, identifier, text in found:
        where = f"{path}, line {number}"
        name = id_at(identifier, "query", where)
        if judged is not None and name not in judged:
            continue
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: query {name!r} has no text")
        if name in queries:
            raise InputError(f"{where}: query id {name!r} occurs twice")
        queries[name] = text.strip()
    if not queries and judged is None:
        raise InputError(f"{path} holds no queries")
    return queries
