"""Documents, queries and judgements: what is ranked, for whom, and what was right."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

from fullrank.core.errors import InputError

Queries: TypeAlias = Mapping[str, str]
"""Query id -> text."""

Qrels: TypeAlias = Mapping[str, Mapping[str, int]]
"""Query id -> {document id: grade}. Grades below 1 are not relevant."""


@dataclass(frozen=True, slots=True)
class Document:
    """One thing to be found: an id, a title (may be empty), a text, and metadata for filters."""

    id: str
    text: str
    title: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def contents(self) -> str:
        """Title and text as one string, which is what retrievers see."""
        return f"{self.title}\n{self.text}" if self.title else self.text


def check_id(identifier: object, what: str) -> str:
    """Return a valid id or raise: TREC files separate columns by white space, so ids hold none.

    >>> check_id("doc-1", "document")
    'doc-1'
    """
    if not isinstance(identifier, str):
        raise InputError(
            f"{what} id {identifier!r} is a {type(identifier).__name__}; ids are strings"
        )
    if not identifier or any(map(str.isspace, identifier)):
        raise InputError(
            f"{what} id {identifier!r} is empty or holds white space; "
            "ids must be non-empty and free of it, e.g. 'doc_17'"
        )
    return identifier


class Corpus:
    r"""An immutable, columnar collection of documents.

    Parameters
    ----------
    ids
        Document ids: unique, non-empty, without white space.
    texts
        Document bodies, as many as ids.
    titles
        Titles, as many as ids; empty strings by default.
    metadata
        One mapping a document, for filters; empty by default.

    Raises
    ------
    InputError
        On an empty collection, columns of different lengths, a bad or a repeated id.

    Examples
    --------
    >>> corpus = Corpus(["a", "b"], ["the first text", "the second"], titles=["One", ""])
    >>> len(corpus), corpus["a"].contents
    (2, 'One\nthe first text')
    """

    def __init__(
        self,
        ids: Sequence[str],
        texts: Sequence[str],
        titles: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> None:
        self.ids = tuple(check_id(i, "document") for i in ids)
        self.texts = tuple(texts)
        self.titles = tuple(titles) if titles is not None else ("",) * len(self.ids)
        self.metadata = tuple(metadata) if metadata is not None else ({},) * len(self.ids)
        if not self.ids:
            raise InputError("the corpus is empty; give at least one document")
        for column in ("texts", "titles", "metadata"):
            if (length := len(getattr(self, column))) != len(self.ids):
                raise InputError(f"{len(self.ids)} ids but {length} {column}; they must match")
        for column in ("texts", "titles"):
            for i, value in zip(self.ids, getattr(self, column), strict=True):
                if not isinstance(value, str):
                    raise InputError(
                        f"document {i!r}: its {column[:-1]} is a {type(value).__name__}, not a str"
                    )
        self._row: dict[str, int] = {}
        for row, i in enumerate(self.ids):
            if self._row.setdefault(i, row) != row:
                raise InputError(
                    f"document id {i!r} occurs twice (rows {self._row[i]} and {row}); "
                    "ids must be unique"
                )

    @classmethod
    def from_documents(cls, documents: Iterable[Document]) -> Corpus:
        """Build a corpus from :class:`Document` objects."""
        rows = list(documents)
        return cls(
            [d.id for d in rows],
            [d.text for d in rows],
            [d.title for d in rows],
            [d.metadata for d in rows],
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __contains__(self, identifier: object) -> bool:
        return identifier in self._row

    def __getitem__(self, identifier: str) -> Document:
        try:
            row = self._row[identifier]
        except KeyError:
            raise InputError(f"no document {identifier!r} in this corpus of {len(self)}") from None
        return Document(identifier, self.texts[row], self.titles[row], self.metadata[row])

    def __iter__(self) -> Iterator[Document]:
        for row in zip(self.ids, self.texts, self.titles, self.metadata, strict=True):
            yield Document(*row)

    def __repr__(self) -> str:
        return f"Corpus({len(self)} documents)"

    def row(self, identifier: str) -> int:
        """Position of a document: row ``i`` of an embedding matrix belongs to ``ids[i]``."""
        return self._row[identifier]

    @cached_property
    def contents(self) -> tuple[str, ...]:
        """Title and text of every document as one string (see :attr:`Document.contents`)."""
        return tuple(document.contents for document in self)

    def subset(self, identifiers: Iterable[str]) -> Corpus:
        """Return the corpus of these documents, in this corpus's order."""
        wanted = set(identifiers)
        unknown = wanted - self._row.keys()
        if unknown:
            raise InputError(f"{len(unknown)} ids are not in the corpus, e.g. {min(unknown)!r}")
        return Corpus.from_documents(d for d in self if d.id in wanted)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over ids, titles and texts, in order: the key of everything cached from it."""
        digest = hashlib.sha256()
        for columns in zip(self.ids, self.titles, self.texts, strict=True):
            for value in columns:
                data = value.encode("utf-8", "surrogatepass")
                digest.update(len(data).to_bytes(8, "little") + data)
        return digest.hexdigest()
