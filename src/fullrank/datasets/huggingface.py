"""Hugging Face data sets: documents in a table, or a retrieval collection in three."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fullrank.core.errors import InputError, require
from fullrank.core.progress import progress
from fullrank.datasets.dataset import Dataset
from fullrank.datasets.jsonl import ID_FIELDS
from fullrank.datasets.judgements import collect_qrels
from fullrank.datasets.query_files import QUERY_ID_FIELDS, collect_queries
from fullrank.datasets.reading import Rows

_QUERY_COLUMNS = ("query-id", "query_id", "qid")
_DOCUMENT_COLUMNS = ("corpus-id", "corpus_id", "doc_id", "docid")
_GRADE_COLUMNS = ("score", "relevance", "label")


def from_huggingface(
    source: str | Path | Any,
    *,
    config: str | None = None,
    split: str | None = None,
    id_column: str | None = None,
    text_column: str = "text",
    title_column: str = "title",
    limit: int | None = None,
) -> Dataset:
    """Read a Hugging Face data set; one from the hub is downloaded to its cache.

    A data set with the configurations ``corpus`` and ``queries`` (the layout of MTEB's
    retrieval tasks, with the judgements in ``default`` or ``qrels``) is read whole. Of any other
    each row is a document, and there are no queries.

    Parameters
    ----------
    source
        Name on the hub, a local folder, or a table (``datasets.Dataset``) already loaded.
    config
        Configuration that holds the documents, where there are several.
    split
        Of the documents (``"train"`` by default) or, in a retrieval collection, of the
        judgements (``"test"`` by default).
    id_column
        By default ``_id``, ``id``, ``doc_id``, ``docno`` or ``docid``; without one of these
        the row's number.
    text_column, title_column
        Where text and title stand. Other columns become metadata.
    limit
        Read only so many documents.

    Raises
    ------
    InputError
        When the data set, a split or a column is not there.
    MissingExtraError
        Without the extra ``hf``.

    Examples
    --------
    >>> import datasets
    >>> table = datasets.Dataset.from_dict({"id": ["a"], "text": ["Low rank."]})
    >>> from_huggingface(table).corpus.ids
    ('a',)
    """
    library = require("datasets", extra="hf")
    columns = (id_column, text_column, title_column)
    if not isinstance(source, str | Path):
        return _documents_only("huggingface", source, columns, limit)
    name = str(source)
    configs = _configs(library, name)
    if config is None and {"corpus", "queries"} <= set(configs):
        return _retrieval(library, name, configs, split or "test", columns, limit)
    table = _load(library, name, config, split or "train")
    return _documents_only(name, table, columns, limit)


def _configs(library: Any, name: str) -> list[str]:
    try:
        return list(library.get_dataset_config_names(name))
    except Exception as error:
        raise InputError(f"no Hugging Face data set {name!r} can be read: {error}") from error


def _load(library: Any, name: str, config: str | None, split: str) -> Any:
    try:
        return library.load_dataset(name, config, split=split)
    except Exception as error:
        detail = f"configuration {config!r}, split {split!r}"
        raise InputError(f"cannot load {name} ({detail}): {error}") from error


def _documents_only(
    name: str, table: Any, columns: tuple[str | None, str, str], limit: int | None
) -> Dataset:
    corpus = _rows(name, table, columns, limit).corpus()
    manifest = {"name": name, "format": "Hugging Face", "sha256": corpus.fingerprint}
    return Dataset(name, corpus, {}, {}, manifest=manifest)


def _retrieval(
    library: Any,
    name: str,
    configs: Iterable[str],
    split: str,
    columns: tuple[str | None, str, str],
    limit: int | None,
) -> Dataset:
    # Corpus and queries come in one split, named like its configuration.
    corpus = _rows(name, _only_split(library, name, "corpus"), columns, limit).corpus()
    judgements = next((c for c in ("default", "qrels") if c in configs), None)
    if judgements is None:
        raise InputError(f"{name} has no configuration 'default' or 'qrels' with the judgements")
    qrels = collect_qrels(_qrels(_load(library, name, judgements, split), name), name)
    texts = _only_split(library, name, "queries")
    queries = collect_queries(_queries(texts, f"{name}, queries"), f"{name}, queries", qrels)
    manifest = {"name": name, "format": "Hugging Face", "split": split}
    return Dataset(
        name=name,
        corpus=corpus,
        queries=queries,
        qrels={q: judged for q, judged in qrels.items() if q in queries},
        manifest={**manifest, "sha256": corpus.fingerprint},
    )


def _only_split(library: Any, name: str, config: str) -> Any:
    tables: Mapping[str, Any] = _load(library, name, config, None)  # type: ignore[arg-type]
    return tables[config] if config in tables else next(iter(tables.values()))


def _rows(name: str, table: Any, columns: tuple[str | None, str, str], limit: int | None) -> Rows:
    there = list(table.column_names)
    id_column, text_column, title_column = columns
    key = id_column or next((c for c in ID_FIELDS if c in there), None)
    for column in (key, text_column):
        if column is not None and column not in there:
            raise InputError(f"{name} has no column {column!r}; it has {', '.join(there)}")
    rows = Rows(name)
    total = len(table) if limit is None else min(limit, len(table))
    with progress("read documents", total, unit="docs") as advance:
        for number, row in enumerate(table):
            if number >= total:
                break
            rest = {k: v for k, v in row.items() if k not in (key, text_column, title_column)}
            identifier = str(number) if key is None else row[key]
            rows.add(identifier, row[text_column], row.get(title_column), rest, line=number + 1)
            advance(1)
    return rows


def _queries(table: Any, where: str) -> Iterator[tuple[int, object, object]]:
    key = _column(table, QUERY_ID_FIELDS, where)
    for number, row in enumerate(table, 1):
        yield number, row[key], row.get("text")


def _qrels(table: Any, where: str) -> Iterator[tuple[object, object, object]]:
    query = _column(table, _QUERY_COLUMNS, where)
    document = _column(table, _DOCUMENT_COLUMNS, where)
    grade = _column(table, _GRADE_COLUMNS, where)
    for row in table:
        yield row[query], row[document], row[grade]


def _column(table: Any, names: Iterable[str], where: str) -> str:
    for name in names:
        if name in table.column_names:
            return name
    raise InputError(
        f"{where}: expected a column {' or '.join(names)}; there are {table.column_names}"
    )
