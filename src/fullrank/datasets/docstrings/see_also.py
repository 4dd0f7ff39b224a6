"""The parts of a numpydoc docstring that queries and judgements are made of."""

from __future__ import annotations

import re
from typing import NamedTuple

_UNDERLINE = re.compile(r"\s*([-=~^])\1{2,}\s*$")
_NAME = r"[A-Za-z_][\w.]*"
_REFERENCE = re.compile(
    rf":[\w:+.-]+:`[~!]?\.?(?P<role>{_NAME})(?:\(\))?`"  # :func:`name`
    rf"|`{{1,2}}[~!]?(?P<ticked>{_NAME})(?:\(\))?`{{1,2}}_?"  # `name`, ``name``
    rf"|(?P<bare>{_NAME})(?:\(\))?"
)
_DESCRIPTION = re.compile(r"\s+:(?:\s|$)|:(?:\s|$)|\s+--?\s")
_TEMPLATE = re.compile(r"^\s*(?:%\(\w+\)s|\$\{\w+\})\s*$\n?", re.MULTILINE)
_SIGNATURE = re.compile(
    r"[\w.]+(?:, [\w.]+)*\s*(?:=\s*[\w.]+\s*)?\(.*\)\s*(?:(?:->|--).*)?", re.DOTALL
)


class DocParts(NamedTuple):
    """A docstring taken apart."""

    text: str
    """The docstring without its See Also section."""
    references: tuple[str, ...]
    """The names in that section, in order, once each."""
    summary: str
    """Its first paragraph on one line; empty when there is none."""


def split_docstring(doc: str) -> DocParts:
    r"""Take the See Also section out of a docstring (dedented, as ``inspect.cleandoc`` leaves it).

    Examples
    --------
    >>> section = "See Also\n--------\nmean, :func:`prod` : Other\n    reductions.\n\n"
    >>> parts = split_docstring(f"Sum of all.\n\n{section}Notes\n-----\nFast.")
    >>> parts.summary, parts.references
    ('Sum of all.', ('mean', 'prod'))
    >>> parts.text
    'Sum of all.\n\nNotes\n-----\nFast.'
    """
    kept: list[str] = []
    section: list[str] = []
    lines = _TEMPLATE.sub("", doc).splitlines()
    row = 0
    while row < len(lines):
        if (width := _header(lines, row)) == 0:
            kept.append(lines[row])
            row += 1
            continue
        end = row + width
        while end < len(lines) and not _is_heading(lines, end):
            end += 1
        section += lines[row + width : end]
        row = end
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(kept)).strip()
    return DocParts(text, _references(section), _summary(text))


def _header(lines: list[str], row: int) -> int:
    """How many lines open a See Also section here: 0 when none does."""
    title = lines[row].strip().lower().rstrip(":")
    if title == "see also" and row + 1 < len(lines) and _UNDERLINE.match(lines[row + 1]):
        return 2
    return 1 if title == ".. seealso" else 0


def _is_heading(lines: list[str], row: int) -> bool:
    """Whether any section starts here."""
    return (
        row + 1 < len(lines)
        and bool(lines[row].strip())
        and _UNDERLINE.match(lines[row + 1]) is not None
    )


def _references(section: list[str]) -> tuple[str, ...]:
    """Names at the section's left margin; what is indented further describes them."""
    names: dict[str, None] = {}
    written = [line for line in section if line.strip()]
    margin = min((len(w) - len(w.lstrip()) for w in written), default=0)
    unfinished = False
    for line in written:
        if line[margin].isspace() and not unfinished:
            continue
        head = _DESCRIPTION.split(line.strip(), maxsplit=1)[0].strip()
        unfinished = head.endswith(",")
        pieces = [p.strip() for p in head.rstrip(",.").split(",")]
        found = [_REFERENCE.fullmatch(piece) for piece in pieces]
        if all(found):
            names |= dict.fromkeys(next(filter(None, m.groups())) for m in found if m)
        else:
            unfinished = False
    return tuple(names)


def _summary(text: str) -> str:
    """First paragraph of prose; C functions open with their signature, some with a directive."""
    lines: list[str] = []
    rows = text.splitlines()
    for row, line in enumerate([*rows, ""]):
        if row < len(rows) and _is_heading(rows, row):
            break
        if line.strip():
            lines.append(line.strip())
            continue
        paragraph = " ".join(lines)
        if paragraph and not paragraph.startswith("..") and not _SIGNATURE.fullmatch(paragraph):
            return paragraph
        lines = []
    paragraph = " ".join(lines)
    return "" if paragraph.startswith("..") or _SIGNATURE.fullmatch(paragraph) else paragraph


def plain(summary: str) -> str:
    """A summary as one would type it: reStructuredText roles and quotes taken off.

    >>> plain("Inverse of :func:`~numpy.fft.rfft`, see ``axis``.")
    'Inverse of numpy.fft.rfft, see axis.'
    """
    return re.sub(r"(?::[\w:+.-]+:)?`{1,2}~?([^`]*)`{1,2}_{0,2}", r"\1", summary)
