"""TREC topics: ``<top>`` blocks with unclosed tags, and the XML forms that came after."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path

from fullrank.core.errors import InputError
from fullrank.datasets.reading import Errors, find_file, id_at, read_lines

_OPEN = re.compile(r"<(top|topic)\b([^>]*)>", re.IGNORECASE)
_ATTRIBUTE = re.compile(r"\b(?:number|num|id|qid)\s*=\s*[\"']([^\"']*)[\"']", re.IGNORECASE)
_TAG = re.compile(r"<(/?)([A-Za-z][\w-]*)[^>]*>")
_LABEL = re.compile(r"\s*(?:number|topic|title|description|narrative|query)\s*:\s*", re.IGNORECASE)
_NUMBERS = ("num", "number", "id", "qid")
_DEFAULT = ("title", "query", "text", "question")


def read_topics(
    path: str | Path, *, field: str | None = None, errors: Errors = "strict"
) -> dict[str, str]:
    """Read the topics of a TREC collection.

    Parameters
    ----------
    path
        The file; compressed when it ends in ``.gz``.
    field
        The tag that holds the query (``"desc"``, ``"narr"``); by default the first there is of
        ``title``, ``query``, ``text`` and ``question``.
    errors
        ``"replace"`` reads a file that is not UTF-8 throughout.

    Returns
    -------
    dict
        Topic number (of ``<num>`` or an attribute) -> text on one line.

    Raises
    ------
    InputError
        On a topic without number or text, or a repeated number.

    Examples
    --------
    >>> import tempfile
    >>> file = Path(tempfile.mkdtemp()) / "topics"
    >>> _ = file.write_text('''<top>
    ... <num> Number: 301
    ... <title> International Organized Crime
    ... <desc> Description:
    ... Identify organizations.
    ... </top>''')
    >>> read_topics(file)
    {'301': 'International Organized Crime'}
    """
    file = find_file(path)
    topics: dict[str, str] = {}
    for line, attributes, body in _blocks(file, errors):
        where = f"{file}, line {line}"
        fields = _fields(body)
        attribute = _ATTRIBUTE.search(attributes)
        given = next((fields[n] for n in _NUMBERS if n in fields), attribute and attribute[1])
        if given is None:
            raise InputError(f"{where}: a topic without a <num> or a number= attribute")
        number = id_at(given, "query", where)
        wanted = [field.lower()] if field else _DEFAULT
        text = next((fields[name] for name in wanted if fields.get(name)), "")
        if not text:
            raise InputError(
                f"{where}: topic {number} has no text in {' or '.join(f'<{n}>' for n in wanted)}; "
                f"its tags are {sorted(fields)}"
            )
        if number in topics:
            raise InputError(f"{where}: topic {number} occurs twice")
        topics[number] = text
    if not topics:
        raise InputError(f"{file} holds no topics; expected <top> or <topic number=...> blocks")
    return topics


def _blocks(file: Path, errors: Errors) -> Iterator[tuple[int, str, str]]:
    """First line, attributes and inside of each topic."""
    start, attributes = 0, ""
    body: list[str] = []
    closing = _OPEN
    for number, line in read_lines(file, errors):
        rest = line
        while rest:
            if not start:
                opened = _OPEN.search(rest)
                if opened is None:
                    break
                start, attributes, body = number, opened[2], []
                closing = re.compile(rf"</{opened[1]}\s*>", re.IGNORECASE)
                rest = rest[opened.end() :]
            closed = closing.search(rest)
            if closed is None:
                body.append(rest)
                break
            body.append(rest[: closed.start()])
            yield start, attributes, "\n".join(body)
            start, rest = 0, rest[closed.end() :]
    if start:
        raise InputError(f"{file}, line {start}: this topic is not closed")


def _fields(body: str) -> dict[str, str]:
    """Text after each opening tag, up to the next tag; labels like ``Number:`` taken off."""
    tags = list(_TAG.finditer(body))
    ends = [tag.start() for tag in tags[1:]] + [len(body)]
    fields: dict[str, str] = {}
    for tag, end in zip(tags, ends, strict=True):
        if not tag[1]:
            text = body[tag.end() : end]
            if label := _LABEL.match(text):
                text = text[label.end() :]
            fields.setdefault(tag[2].lower(), " ".join(html.unescape(text).split()))
    return fields
