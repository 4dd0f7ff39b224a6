"""Collections of the `ir_datasets` catalogue, by id."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fullrank.core.errors import InputError, require
from fullrank.core.progress import progress
from fullrank.datasets.dataset import Dataset
from fullrank.datasets.judgements import collect_qrels
from fullrank.datasets.reading import Rows, id_at

_TEXT_FIELDS = ("text", "body", "abstract", "contents")


def from_ir_datasets(identifier: str | Any) -> Dataset:
    """Read a collection that the library ir_datasets knows; it downloads what is not there yet.

    Parameters
    ----------
    identifier
        E.g. ``"beir/scifact/test"`` or ``"vaswani"``; or a data set loaded with the library.

    Returns
    -------
    Dataset
        With the queries that have judgements; without queries when it has only documents.

    Raises
    ------
    InputError
        When the library does not know the id, or the data set has no documents.
    MissingExtraError
        Without the extra ``ir-datasets``.
    """
    library = require("ir_datasets", extra="ir-datasets")
    source: Any = identifier
    name = "ir_datasets"
    if isinstance(identifier, str):
        name = identifier
        try:
            source = library.load(identifier)
        except KeyError:
            raise InputError(
                f"ir_datasets knows no data set {identifier!r}; "
                "its ids are listed at https://ir-datasets.com"
            ) from None
    if not source.has_docs():
        raise InputError(f"{name} has no documents of its own; name the data set that has them")
    rows = Rows(name)
    with progress("read documents", source.docs_count(), unit="docs") as advance:
        for document in source.docs_iter():
            rows.add(document.doc_id, _text(document), getattr(document, "title", "") or "")
            advance(1)
    qrels = collect_qrels(_qrels(source), name) if source.has_qrels() else {}
    queries = {}
    for query in source.queries_iter() if source.has_queries() else ():
        identity = id_at(query.query_id, "query", name)
        if not qrels or identity in qrels:
            queries[identity] = str(query.default_text())
    corpus = rows.corpus()
    return Dataset(
        name=name,
        corpus=corpus,
        queries=queries,
        qrels={q: judged for q, judged in qrels.items() if q in queries},
        manifest={"name": name, "format": "ir_datasets", "sha256": corpus.fingerprint},
    )


def _text(document: Any) -> str:
    """The body of a document; the title is kept apart from it where the record does so."""
    for field in _TEXT_FIELDS:
        if isinstance(value := getattr(document, field, None), str):
            return value
    return str(document.default_text())


def _qrels(source: Any) -> Iterator[tuple[object, object, object]]:
    for judgement in source.qrels_iter():
        yield judgement.query_id, judgement.doc_id, judgement.relevance
