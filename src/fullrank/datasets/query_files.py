"""Query files in the forms they come in: JSON lines, tab-separated, TREC topics, one a line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from fullrank.core.errors import InputError
from fullrank.datasets.jsonl import find_id_field, read_objects
from fullrank.datasets.reading import Errors, find_file, id_at, read_lines
from fullrank.datasets.topics import read_topics


def read_queries(path: str | Path, *, errors: Errors = "strict") -> dict[str, str]:
    r"""Read queries; the form is told from the first line that is not empty.

    Parameters
    ----------
    path
        JSON lines with ``_id`` or ``id`` and ``text``; TREC topics (``<top>``, ``<topic>``);
        lines of an id, a tab and a text; or one query a line, whose ids are the line numbers.
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
        return collect_queries(_from_objects(file, errors), file)
    return collect_queries(_from_lines(file, "\t" in first, errors), file)


def _from_objects(file: Path, errors: Errors) -> Iterator[tuple[int, object, object]]:
    for number, record in read_objects(file, errors):
        where = f"{file}, line {number}"
        key = find_id_field({k: v for k, v in record.items() if k != "text"}, where)
        yield number, record[key], record.get("text")


def _from_lines(file: Path, tabs: bool, errors: Errors) -> Iterator[tuple[int, object, object]]:
    for number, line in read_lines(file, errors):
        if not line.strip():
            continue
        identifier, tab, text = line.partition("\t")
        if tabs and not tab:
            raise InputError(f"{file}, line {number}: expected an id, a tab and a query")
        yield number, identifier if tabs else str(number), text if tabs else line


def collect_queries(
    found: Iterable[tuple[int, object, object]], path: str | Path
) -> dict[str, str]:
    """Queries from (line, id, text), checked."""
    queries: dict[str, str] = {}
    for number, identifier, text in found:
        where = f"{path}, line {number}"
        name = id_at(identifier, "query", where)
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{where}: query {name!r} has no text")
        if name in queries:
            raise InputError(f"{where}: query id {name!r} occurs twice")
        queries[name] = text.strip()
    if not queries:
        raise InputError(f"{path} holds no queries")
    return queries
