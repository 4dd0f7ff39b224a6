"""`Dataset`: documents, queries and judgements that belong together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fullrank.core.corpus import Corpus, Qrels, Queries
from fullrank.core.errors import InputError


@dataclass(frozen=True)
class Dataset:
    """A test collection: what is searched, what is asked, and what should be found.

    Parameters
    ----------
    name
        Shown in tables.
    corpus
        The documents.
    queries
        Query id -> text.
    qrels
        Query id -> {document id: grade}.
    exclude
        Query id -> documents left out of its ranking, e.g. the one it was made from.
    clusters
        Query id -> label of queries that are not independent, for the bootstrap.
    parts
        Part (``"train"``, ``"dev"``, ``"test"``) -> its query ids.
    manifest
        Where it comes from: versions, counts, a hash of the corpus; JSON values.

    Examples
    --------
    >>> corpus = Corpus(["a", "b"], ["apples", "pears"])
    >>> data = Dataset("fruit", corpus, {"q1": "apple", "q2": "pear"},
    ...                {"q1": {"a": 1}, "q2": {"b": 1}}, parts={"test": ("q2",)})
    >>> data
    Dataset(fruit: 2 documents, 2 queries, 2 judgements; test 1)
    >>> data.split("test").queries
    {'q2': 'pear'}
    """

    name: str
    corpus: Corpus
    queries: Queries
    qrels: Qrels
    exclude: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    clusters: Mapping[str, str] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def split(self, part: str) -> Dataset:
        """Return the same corpus with one part's queries, judgements, exclusions and clusters.

        Raises
        ------
        InputError
            When there is no such part; the message names those there are.
        """
        if part not in self.parts:
            there = ", ".join(map(repr, self.parts)) or "none: it is not divided"
            raise InputError(f"{self.name} has no part {part!r}; its parts are {there}")
        chosen = self.parts[part]
        return Dataset(
            name=f"{self.name}/{part}",
            corpus=self.corpus,
            queries={q: self.queries[q] for q in chosen},
            qrels={q: self.qrels[q] for q in chosen if q in self.qrels},
            exclude={q: self.exclude[q] for q in chosen if q in self.exclude},
            clusters={q: self.clusters[q] for q in chosen if q in self.clusters},
            manifest=self.manifest,
        )

    def __repr__(self) -> str:
        judgements = sum(map(len, self.qrels.values()))
        parts = ", ".join(f"{part} {len(queries)}" for part, queries in self.parts.items())
        return (
            f"Dataset({self.name}: {len(self.corpus)} documents, {len(self.queries)} queries, "
            f"{judgements} judgements{'; ' + parts if parts else ''})"
        )
