"""TREC collections: SGML documents, topics and judgements."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from fullrank.core.corpus import Corpus
from fullrank.core.errors import InputError
from fullrank.datasets.dataset import Dataset
from fullrank.datasets.judgements import read_qrels
from fullrank.datasets.reading import Errors, Rows, find_file, read_lines
from fullrank.datasets.topics import read_topics

_OPEN = re.compile(r"<doc(?:\s[^>]*)?>", re.IGNORECASE)
_CLOSE = re.compile(r"</doc\s*>", re.IGNORECASE)
_NUMBER = re.compile(r"<docno(?:\s[^>]*)?>\s*(.*?)\s*</docno\s*>", re.IGNORECASE | re.DOTALL)
_TITLE = re.compile(
    r"<(title|headline|head|ti)(?:\s[^>]*)?>(.*?)</\1\s*>", re.IGNORECASE | re.DOTALL
)
_TEXT = re.compile(r"<text(?:\s[^>]*)?>(.*?)</text\s*>", re.IGNORECASE | re.DOTALL)
_ANY_TAG = re.compile(r"</?[A-Za-z][^<>]*>|<!--.*?-->", re.DOTALL)

Paths = str | Path | Sequence[str | Path]


def trec(
    documents: Paths,
    topics: str | Path,
    qrels: str | Path,
    *,
    name: str | None = None,
    field: str | None = None,
    errors: Errors = "strict",
) -> Dataset:
    """Read a TREC collection.

    Parameters
    ----------
    documents
        A file of ``<DOC>`` records, a folder of such files, or several; may be compressed.
    topics
        In classic ``<top>`` blocks or in XML.
    qrels
        ``qid 0 docid grade`` on each line.
    name
        Shown in tables; by default the name of the documents' folder.
    field
        The topics' tag that holds the query; by default the title.
    errors
        ``"replace"`` reads files that are not UTF-8 throughout.

    Returns
    -------
    Dataset
        With the topics that have judgements, and the judgements of those topics.

    Raises
    ------
    InputError
        When a file is absent or malformed (the message names the line), or no judged query is
        among the topics.
    """
    corpus = trec_documents(documents, errors=errors)
    first = Path(documents if isinstance(documents, str | Path) else documents[0])
    label = name or (first if first.is_dir() else first.parent).resolve().name
    queries = read_topics(topics, field=field, errors=errors)
    judged = read_qrels(qrels)
    both = [q for q in queries if q in judged]
    if not both:
        raise InputError(
            f"{qrels} judges none of the topics of {topics}: its ids look like "
            f"{next(iter(judged))!r}, the topics' like {next(iter(queries))!r}"
        )
    return Dataset(
        name=label,
        corpus=corpus,
        queries={q: queries[q] for q in both},
        qrels={q: judged[q] for q in both},
        manifest={"name": label, "format": "TREC", "sha256": corpus.fingerprint},
    )


def trec_documents(documents: Paths, *, errors: Errors = "strict") -> Corpus:
    """Read ``<DOC>`` records.

    The id is ``<DOCNO>``, the title the first of ``<TITLE>``, ``<HEADLINE>``, ``<HEAD>`` and
    ``<TI>``; the text what stands in ``<TEXT>``, or without one everything but id and title.
    Tags are taken off and character references read.

    Parameters
    ----------
    documents
        A file, a folder, or several of them; files may be compressed (``.gz``).
    errors
        ``"replace"`` reads files that are not UTF-8 throughout.

    Raises
    ------
    InputError
        On a record without ``<DOCNO>`` or without an end, and on repeated ids.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "docs.trec"
    >>> _ = file.write_text("<DOC><DOCNO> A-1 </DOCNO><TEXT>Ranks &amp; files</TEXT></DOC>")
    >>> trec_documents(file)["A-1"].text
    'Ranks & files'
    """
    given = [documents] if isinstance(documents, str | Path) else list(documents)
    rows = Rows(", ".join(map(str, given)))
    for path in map(Path, given):
        for file in _files(path):
            for line, body in _records(file, errors):
                number = _NUMBER.search(body)
                if number is None:
                    raise InputError(f"{file}, line {line}: a <DOC> without <DOCNO>...</DOCNO>")
                rest = body[: number.start()] + body[number.end() :]
                title = _TITLE.search(rest)
                texts = [found[1] for found in _TEXT.finditer(rest)]
                if not texts:
                    texts = [rest if title is None else _without(rest, title)]
                rows.add(
                    number[1],
                    _plain("\n".join(texts)),
                    "" if title is None else " ".join(_plain(title[2]).split()),
                    line=line,
                    path=file,
                )
    return rows.corpus()


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [find_file(path)]
    files = [
        f
        for f in sorted(path.rglob("*"))
        if f.is_file() and not any(p.startswith(".") for p in f.relative_to(path).parts)
    ]
    if not files:
        raise InputError(f"the folder {path} is empty; expected files of <DOC> records")
    return files


def _records(file: Path, errors: Errors) -> Iterator[tuple[int, str]]:
    """First line and inside of each ``<DOC>``, one record in memory at a time."""
    start = 0
    body: list[str] = []
    for number, line in read_lines(file, errors):
        rest = line
        while rest or start:
            if not start:
                opened = _OPEN.search(rest)
                if opened is None:
                    break
                start, body, rest = number, [], rest[opened.end() :]
            closed = _CLOSE.search(rest)
            if closed is None:
                if _OPEN.search(rest):
                    raise InputError(
                        f"{file}, line {number}: a <DOC> inside the one of line {start}, "
                        "which lacks its </DOC>"
                    )
                body.append(rest)
                break
            body.append(rest[: closed.start()])
            yield start, "\n".join(body)
            start, rest = 0, rest[closed.end() :]
    if start:
        raise InputError(f"{file}, line {start}: this <DOC> has no </DOC>")


def _without(text: str, found: re.Match[str]) -> str:
    return text[: found.start()] + text[found.end() :]


def _plain(text: str) -> str:
    return html.unescape(_ANY_TAG.sub(" ", text)).strip()
