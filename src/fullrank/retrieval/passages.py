"""Passages: documents that are longer than the encoder, in overlapping pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Corpus
from fullrank.core.errors import InputError
from fullrank.core.progress import progress as progress_bar
from fullrank.retrieval.retriever import readable
from fullrank.retrieval.rust_tokenizers import rust_tokenizer

if TYPE_CHECKING:
    from fullrank.retrieval.encoder import Encoder

Rows: TypeAlias = npt.NDArray[np.int64]

# Documents tokenised at once.
_WINDOW = 512
# A title takes at most this share of a passage, or it is not repeated.
_TITLE_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class Passages:
    """Which part of which document each vector stands for.

    Parameters
    ----------
    document
        ``(P,)`` row of the document in the corpus, rising; every document has a passage.
    start, stop
        ``(P,)`` where the passage is in the document's contents, in characters.
    lead
        ``(P,)`` how many of the contents' first characters are put in front of the passage
        before it is encoded: its title. None for nowhere.

    Examples
    --------
    >>> passages = Passages(np.array([0, 0, 1]), np.array([0, 4, 0]), np.array([6, 9, 3]))
    >>> passages.of(0), passages.texts(["one two three", "abc"])
    (slice(0, 2, None), ['one tw', 'two t', 'abc'])
    """

    document: Rows
    start: Rows
    stop: Rows
    lead: Rows | None = None

    def __post_init__(self) -> None:
        columns = [self.document, self.start, self.stop]
        if self.lead is not None:
            columns.append(self.lead)
        if len({np.shape(column) for column in columns}) > 1 or np.ndim(self.document) != 1:
            raise InputError("the columns of passages differ in length")
        if len(self.document) and (
            self.document[0] != 0 or not np.isin(np.diff(self.document), (0, 1)).all()
        ):
            raise InputError("passages must stand in their documents' order, one or more for each")

    @classmethod
    def whole(cls, contents: Sequence[str]) -> Passages:
        """One passage a document: all of it, of which an encoder sees the beginning."""
        count = len(contents)
        return cls(
            np.arange(count, dtype=np.int64),
            np.zeros(count, dtype=np.int64),
            np.array([len(text) for text in contents], dtype=np.int64),
        )

    def __len__(self) -> int:
        return len(self.document)

    @cached_property
    def first(self) -> Rows:
        """``(N + 1,)`` row of each document's first passage, and one past the last."""
        documents = int(self.document[-1]) + 1 if len(self) else 0
        return np.searchsorted(self.document, np.arange(documents + 1)).astype(np.int64)

    @property
    def documents(self) -> int:
        """Number N of documents."""
        return len(self.first) - 1

    @property
    def single(self) -> bool:
        """Whether every document is one passage."""
        return len(self) == self.documents

    def of(self, row: int) -> slice:
        """Rows of one document's passages."""
        return slice(int(self.first[row]), int(self.first[row + 1]))

    def text(self, contents: Sequence[str], passage: int) -> str:
        """Return one passage as it stands in its document."""
        text = contents[int(self.document[passage])]
        return text[int(self.start[passage]) : int(self.stop[passage])]

    def texts(self, contents: Sequence[str]) -> list[str]:
        """Return what is encoded: every passage, behind its document's title."""
        lead = self.lead if self.lead is not None else np.zeros_like(self.start)
        return [
            contents[document][:title] + contents[document][start:stop]
            for document, start, stop, title in zip(
                self.document.tolist(),
                self.start.tolist(),
                self.stop.tolist(),
                lead.tolist(),
                strict=True,
            )
        ]


def split_passages(
    corpus: Corpus, encoder: Encoder, *, overlap: float = 0.25, progress: bool = False
) -> Passages:
    """Split the documents that are longer than an encoder takes.

    Passages are as long as the encoder takes, in its own tokens, and begin and end between words
    where they can. All but a document's first are encoded behind its title, unless that is long.

    Parameters
    ----------
    corpus
        The documents.
    encoder
        Whose tokens are counted and whose ``max_tokens`` is the length. One without a fast
        tokenizer cannot say where tokens are: then every document is one passage.
    overlap
        Share of a passage that the next one repeats, in [0, 0.9].
    progress
        Whether to show a bar.

    Examples
    --------
    >>> from fullrank.retrieval import Encoder
    >>> encoder = Encoder(max_tokens=16)
    >>> corpus = Corpus(["short", "long"], ["A few words.", "and so it goes on " * 8])
    >>> split_passages(corpus, encoder).document.tolist()
    [0, 1, 1, 1, 1]
    """
    if not 0 <= overlap <= 0.9:
        raise InputError(f"overlap is {overlap}; it is a share between 0 and 0.9")
    tokenizer = rust_tokenizer(encoder.tokenizer)
    contents = corpus.contents
    if tokenizer is None:
        return Passages.whole(contents)
    prompt = len(tokenizer.encode(encoder.prompt("document"), add_special_tokens=False).ids)
    room = encoder.max_tokens - tokenizer.num_special_tokens_to_add(False) - prompt
    room = max(room, 1)
    # A token stands for at least one byte: what has fewer bytes needs no tokenising.
    long = [row for row, text in enumerate(contents) if len(text.encode("utf-8", "replace")) > room]
    pieces: dict[int, list[tuple[int, int, int]]] = {}
    with progress_bar("split", len(long), progress, unit="docs") as advance:
        for begin in range(0, len(long), _WINDOW):
            rows = long[begin : begin + _WINDOW]
            texts = [readable(contents[row]) for row in rows]
            encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
            for row, encoding in zip(rows, encodings, strict=True):
                if len(encoding.ids) > room:
                    title = len(corpus.titles[row]) + 1 if corpus.titles[row] else 0
                    pieces[row] = list(_pieces(encoding, len(contents[row]), room, overlap, title))
            advance(len(rows))
    table = [
        (row, *piece)
        for row, text in enumerate(contents)
        for piece in pieces.get(row, [(0, len(text), 0)])
    ]
    columns = np.array(table, dtype=np.int64).T
    return Passages(*(np.ascontiguousarray(column) for column in columns))


def _pieces(
    encoding: Any, length: int, room: int, overlap: float, title: int
) -> Iterator[tuple[int, int, int]]:
    """Start, stop and lead of each passage of one document, in characters."""
    offsets, words = encoding.offsets, encoding.word_ids
    total = len(offsets)
    titled = sum(1 for _ in _until(offsets, title))
    if titled > room * _TITLE_SHARE:
        title = titled = 0
    begin, stop = 0, _between_words(words, room, 1)
    while True:
        lead = title if begin else 0
        last = stop >= total
        yield offsets[begin][0] if begin else 0, length if last else offsets[stop - 1][1], lead
        if last:
            return
        size = room - titled
        begin = _between_words(words, max(stop - int(size * overlap), begin + 1), begin + 1)
        stop = total if begin + size >= total else _between_words(words, begin + size, begin + 1)


def _until(offsets: Sequence[tuple[int, int]], end: int) -> Iterator[int]:
    for i, (start, _) in enumerate(offsets):
        if start >= end:
            return
        yield i


def _between_words(words: Sequence[int | None], at: int, least: int) -> int:
    """Move a cut back to where a word begins, but not far and not before ``least``."""
    for cut in range(at, max(least, at - 16), -1):
        if words[cut] != words[cut - 1]:
            return cut
    return at
