"""Judgement files: which documents are right for which query."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

from fullrank.core.errors import InputError
from fullrank.datasets.reading import find_file, id_at, read_lines


def read_qrels(path: str | Path) -> dict[str, dict[str, int]]:
    r"""Read judgements in TREC's form (``qid 0 docid grade``) or BEIR's (``qid docid grade``).

    Parameters
    ----------
    path
        The file; compressed when it ends in ``.gz``. A first line whose last column is no
        number is a header.

    Returns
    -------
    dict
        Query id -> {document id: grade}.

    Raises
    ------
    InputError
        On a line of another shape, a grade that is no whole number, two different grades for
        one pair, or a file without judgements.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "test.tsv"
    >>> _ = file.write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\n")
    >>> read_qrels(file)
    {'q1': {'d1': 2}}
    """
    file = find_file(path)
    qrels: dict[str, dict[str, int]] = {}
    for number, line in read_lines(file):
        columns = line.split()
        if not columns:
            continue
        where = f"{file}, line {number}"
        if len(columns) not in (3, 4):
            raise InputError(
                f"{where}: expected 'qid 0 docid grade' or 'qid docid grade', found {line[:80]!r}"
            )
        query, document, grade = columns[0], columns[-2], columns[-1]
        try:
            value = float(grade)
        except ValueError:
            if number == 1:
                continue
            value = math.nan
        whole = _whole(value, grade, where)
        judged = qrels.setdefault(query, {})
        if judged.setdefault(document, whole) != whole:
            raise InputError(
                f"{where}: document {document!r} is judged {whole} for query {query!r}, "
                f"but {judged[document]} on an earlier line"
            )
    if not qrels:
        raise InputError(f"{file} holds no judgements")
    return qrels


def collect_qrels(
    rows: Iterable[tuple[object, object, object]], where: str
) -> dict[str, dict[str, int]]:
    """Judgements from (query id, document id, grade) of a library's records."""
    qrels: dict[str, dict[str, int]] = {}
    for query, document, grade in rows:
        value = grade if isinstance(grade, int | float) else math.nan
        judged = qrels.setdefault(id_at(query, "query", where), {})
        judged[id_at(document, "document", where)] = _whole(value, grade, where)
    return qrels


def _whole(value: float, shown: object, where: str) -> int:
    if not math.isfinite(value) or value != int(value):
        raise InputError(f"{where}: the grade {shown!r} is not a whole number")
    return int(value)
