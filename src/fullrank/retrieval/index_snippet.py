"""Snippets: the part of a document that shows why it was found."""

from __future__ import annotations

import re
from collections import Counter
from typing import TypeAlias

from fullrank.core.corpus import Document

Hit: TypeAlias = tuple[int, int, str]
"""Where a word of the query stands, and its stem."""

_LETTER = re.compile(r"\w")
_WORD = re.compile(r"\w+")
# The rest of a word, in steps: a huge one is not read to its end for every stem that is in it.
_INSIDE = re.compile(r"\w{1,40}")
_SPACE = re.compile(r"\s+")
# Where a snippet may begin: after the end of a sentence or of a line.
_BREAK = re.compile(r"[.!?:;]\s+|\n+\s*")
# What is looked at, at most, of a document, of its hits and of a query, in characters: so that
# huge ones are shown about as fast as others.
_READ = 200_000
_HITS = 1_000
_QUERY = 2_000
# Words that say nothing about where to look.
_COMMON = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be but by for from how in into is it not of on or such that the their "
        "then there these they this to was what when where which who will with",
    )
)


class Snippet(str):
    """A part of a document's text, as a string that knows where it is from.

    Attributes
    ----------
    start, stop
        Where it lies in the document's text (its title, when the text is empty), in characters.
    highlights
        ``(start, stop)`` of the words of the query, relative to the snippet.
    """

    __slots__ = ("highlights", "start", "stop")

    start: int
    stop: int
    highlights: tuple[tuple[int, int], ...]

    def __new__(
        cls, text: str, start: int = 0, highlights: tuple[tuple[int, int], ...] = ()
    ) -> Snippet:
        """Make one from the part, where it begins, and what to highlight."""
        snippet = super().__new__(cls, text)
        snippet.start, snippet.stop, snippet.highlights = start, start + len(text), highlights
        return snippet


def best_snippet(
    query: str, document: Document, *, within: tuple[int, int] | None = None, width: int = 240
) -> Snippet:
    """Return the part of a document that has most of the query's words.

    Parameters
    ----------
    query
        Words that are common everywhere do not count, unless there are no others.
    document
        Its text is looked at, or its title when the text is empty.
    within
        ``(start, stop)`` in the document's *contents*: where to look, e.g. the best passage.
    width
        Characters at most.

    Examples
    --------
    >>> text = "Computes a norm. The nuclear norm is the sum of the singular values. See below."
    >>> snippet = best_snippet("singular value", Document("d", text), width=60)
    >>> snippet, snippet.start, [snippet[a:b] for a, b in snippet.highlights]
    ('The nuclear norm is the sum of the singular values.', 17, ['singular', 'values'])
    """
    text = document.text or document.title
    low, high = 0, len(text)
    if within is not None:
        # Contents are title, line break and text; joining them would copy a long text.
        offset = len(document.title) + 1 if document.title and document.text else 0
        low, high = (min(max(0, at - offset), len(text)) for at in within)
        if low >= high:
            low, high = 0, len(text)
    high = min(high, low + _READ)
    hits = _hits(text, low, high, _wanted(query))
    start, stop = _window(text, low, high, hits, width)
    inside = tuple((a - start, b - start) for a, b, _ in hits if a >= start and b <= stop)
    return Snippet(text[start:stop], start, inside)


def _wanted(query: str) -> frozenset[str]:
    words = set(_WORD.findall(_lower(query[:_QUERY])))
    return frozenset(map(_stem, {w for w in words - _COMMON if len(w) > 1} or words))


def _hits(text: str, low: int, high: int, wanted: frozenset[str]) -> list[Hit]:
    """Find the words of these stems, in order.

    A word begins with its stem, so that only places with those letters are looked at in Python.
    """
    lowered = _lower(text[low:high])
    hits: list[Hit] = []
    for stem in wanted:
        left, at = max(1, _HITS // len(wanted)), lowered.find(stem)
        while at >= 0 and left:
            begins = at == 0 or not _LETTER.match(lowered, at - 1)
            word = (_WORD if begins else _INSIDE).match(lowered, at)
            assert word is not None  # a stem is made of letters
            if begins and _stem(word[0]) == stem:
                hits.append((low + at, low + word.end(), stem))
                left -= 1
            # No other word begins within this one.
            at = lowered.find(stem, word.end())
    return sorted(hits)


def _lower(text: str) -> str:
    """Lower case, letter by letter: the one that would become two stays one."""
    return text.replace("İ", "I").lower()


def _stem(word: str) -> str:
    """Make the common forms of a lower-case English word equal; good enough to highlight by."""
    for ending in ("ing", "ies", "es", "ed", "s", "e", "y"):
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _window(text: str, low: int, high: int, hits: list[Hit], width: int) -> tuple[int, int]:
    """Return the stretch of at most ``width`` characters with the most and rarest hits."""
    counts = Counter(stem for _, _, stem in hits)
    best, start, last, first = 0.0, low, low, 0
    for begin in _beginnings(text, low, high, hits, width):
        while hits[first][0] < begin:
            first += 1
        seen: set[str] = set()
        score, end = 0.0, begin
        for at in range(first, len(hits)):
            _, b, stem = hits[at]
            if b > begin + width:
                break
            # A word that the document is full of says less; said again it adds a little.
            score += (0.05 if stem in seen else 1.0) / (1 + counts[stem]) ** 0.5
            seen.add(stem)
            end = b
        if score > best:
            best, start, last = score, begin, end
    return _trimmed(text, start, last, min(start + width, high), high)


def _beginnings(text: str, low: int, high: int, hits: list[Hit], width: int) -> list[int]:
    """Where a snippet may begin: for each hit its sentence, or a little before it in a long one."""
    starts = set()
    start = read = low
    for begin, end, _ in hits:
        # A sentence that began further back is too long anyway.
        for m in _BREAK.finditer(text, max(read, begin - width), begin):
            start = m.end()
        read = begin
        if end > start + width:
            space = _SPACE.search(text, max(low, begin - width // 3), begin)
            starts.add(space.end() if space else begin)
        else:
            starts.add(start)
    return sorted(starts)


def _trimmed(text: str, start: int, last: int, stop: int, high: int) -> tuple[int, int]:
    """Cut after a sentence, or else a word, beyond the last hit; no white space around."""
    if stop < high:
        sentences = [m.start() + 1 for m in _BREAK.finditer(text, start, stop)]
        words = [m.start() for m in _SPACE.finditer(text, start, stop + 1)]
        ends = [e for e in sentences if e >= last and 2 * (e - start) >= stop - start] or [
            e for e in words if e >= last and e > start
        ]
        stop = ends[-1] if ends else stop
    while start < stop and text[start].isspace():
        start += 1
    while stop > start and text[stop - 1].isspace():
        stop -= 1
    return start, stop
