"""Writing an index: each change is a new generation, and encodes only what is new."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Corpus, Document
from fullrank.core.errors import InputError, StoreError
from fullrank.core.locking import write_lock
from fullrank.retrieval.bm25 import BM25
from fullrank.retrieval.index_encoders import carry_models, describe
from fullrank.retrieval.index_manifest import EncoderRecord, Manifest, Settings, read_manifest
from fullrank.retrieval.index_store import (
    WORK,
    commit,
    new_generation,
    prepare,
    sweep,
    verify_files,
)
from fullrank.retrieval.index_tables import (
    Digests,
    write_documents,
    write_passages,
)
from fullrank.retrieval.index_vectors import (
    VectorCache,
    Vectors,
    VectorSource,
    encode_missing,
    given_vectors,
    text_digests,
    write_vectors,
)
from fullrank.retrieval.index_view import BM25_FOLDER, VECTORS, View
from fullrank.retrieval.passages import Passages, split_passages

Rows: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Options:
    """How to build, beside what to build from."""

    cache: Path | None = None
    progress: bool = True
    given: Mapping[str, Any] = field(default_factory=dict)


def build(
    folder: Path,
    corpus: Corpus,
    encoders: Mapping[str, Any],
    bm25: Mapping[str, Any],
    settings: Settings,
    options: Options,
) -> None:
    """Make the index of a corpus in a folder; an index that is there is replaced at the end."""
    if not isinstance(corpus, Corpus):
        raise InputError(f"the corpus is a {type(corpus).__name__}, not a fullrank.core.Corpus")
    if unknown := set(options.given) - set(encoders):
        raise InputError(f"vectors of {min(unknown)!r}, but there is no encoder of that name")
    given = {
        name: given_vectors(name, vectors, len(corpus), encoders[name].dimension)
        for name, vectors in options.given.items()
    }
    lexical = lexical_index(corpus, bm25)
    prepare(folder)
    with write_lock(folder):
        # What is replaced may have vectors of the same texts.
        old = _whole(folder)
        with new_generation(folder) as (number, part):
            write_documents(part, corpus)
            lexical.save(part / BM25_FOLDER)
            records: dict[str, EncoderRecord] = {}
            for name, encoder in encoders.items():
                records[name] = describe(name, encoder, folder, part)
                source = VectorSource(_stored(old, records[name].key))
                if name in given:
                    passages = Passages.whole(corpus.contents)
                    digests = _given_digests(given[name], source)
                else:
                    passages = split_passages(corpus, encoder, progress=options.progress)
                    texts = passages.texts(corpus.contents)
                    digests = _encoded(name, encoder, texts, source, folder, options)
                _write_encoder(part, name, corpus, passages, digests, source, records[name])
            manifest = Manifest(
                generation=number,
                documents=len(corpus),
                bm25=dict(bm25),
                encoders=records,
                settings=settings,
            )
            commit(folder, manifest, part)
        clear_work(folder)
        if old is not None:
            old.close()
        sweep(folder)


def lexical_index(corpus: Corpus, options: Mapping[str, Any]) -> BM25:
    """Index a corpus for BM25, or say which option it does not have."""
    known = [
        name
        for name, parameter in inspect.signature(BM25).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name != "depth"
    ]
    if unknown := set(options) - set(known):
        raise InputError(f"BM25 has no option {min(unknown)!r}; it has {', '.join(known)}")
    return BM25(corpus, **options)


def checked_documents(documents: Iterable[Document] | Corpus) -> dict[str, Document]:
    """Check documents as a corpus would; return them by id."""
    rows = list(documents)
    if not rows:
        raise InputError("there are no documents to add")
    for row in rows:
        if not isinstance(row, Document):
            raise InputError(f"a {type(row).__name__} is no fullrank.core.Document")
    return {document.id: document for document in Corpus.from_documents(rows)}


def rewrite(
    old: View, new: Mapping[str, Document], gone: Collection[str], options: Options
) -> None:
    """Write a generation that shares most of its documents with the old one.

    Call within :func:`changing`.

    Parameters
    ----------
    old
        What the index is now.
    new
        Id -> document: replaces the one of the same id where it stands, or comes at the end.
    gone
        Ids to leave out.
    options
        Of which only new documents need the cache.
    """
    if not new and not gone:
        return
    documents, origin = _changed(old.corpus, new, set(gone))
    corpus = Corpus.from_documents(documents)
    folder, manifest = old.folder, old.manifest
    lexical = lexical_index(corpus, manifest.bm25)
    with new_generation(folder) as (number, part):
        write_documents(part, corpus)
        lexical.save(part / BM25_FOLDER)
        carry_models(old.part, part, manifest.encoders)
        for name, record in manifest.encoders.items():
            passages, digests = old.passages(name)
            source = VectorSource([(digests, old.vectors(name))])
            pieces = [_carried(passages, digests, origin)]
            if (fresh := np.flatnonzero(origin < 0)).size:
                encoder = old.encoders[name].loaded
                added = Corpus.from_documents([documents[row] for row in fresh])
                split = split_passages(added, encoder, progress=options.progress)
                texts = split.texts(added.contents)
                found = _encoded(name, encoder, texts, source, folder, options)
                pieces.append((fresh[split.document], split, found))
            _write_encoder(part, name, corpus, *_joined(pieces), source, record)
        written = manifest.model_copy(update={"generation": number, "documents": len(corpus)})
        commit(folder, written, part)
    clear_work(folder)


def _changed(
    corpus: Corpus, new: Mapping[str, Document], gone: set[str]
) -> tuple[list[Document], Rows]:
    """Return the documents to be, and each one's old row: -1 where there are new texts."""
    documents: list[Document] = []
    origin: list[int] = []
    for row, old in enumerate(corpus):
        if old.id not in gone:
            document = new.get(old.id, old)
            same = (document.title, document.text) == (old.title, old.text)
            documents.append(document)
            origin.append(row if same else -1)
    added = [document for document in new.values() if document.id not in corpus]
    return documents + added, np.array(origin + [-1] * len(added), dtype=np.int64)


@contextmanager
def changing(
    folder: Path, models: Mapping[str, Any], *, before: View, check: bool = True
) -> Iterator[View]:
    """Be the only writer, and see the index as it is now.

    With ``check`` every byte is compared with its checksum first: damage is not carried on.
    """
    if not folder.is_dir():
        read_manifest(folder)  # says what is wrong
    with write_lock(folder):
        view = View(folder, models, before)
        del before  # nothing here keeps the old generation
        if check:
            verify_files(folder, view.manifest)
        yield view


def clear_work(folder: Path) -> None:
    """Forget what an interrupted run had encoded: it is in the index now."""
    shutil.rmtree(folder / WORK, ignore_errors=True)


def _whole(folder: Path) -> View | None:
    """Return what a folder holds now, when that is an index without damage."""
    try:
        view = View(folder)
        verify_files(folder, view.manifest)
    except StoreError:
        return None
    return view


def _stored(view: View | None, key: str) -> Iterator[tuple[Digests, Vectors]]:
    if view is not None:
        for name, record in view.manifest.encoders.items():
            if record.key == key:
                yield view.passages(name)[1], view.vectors(name)


def _encoded(
    name: str,
    encoder: Any,
    texts: Sequence[str],
    source: VectorSource,
    folder: Path,
    options: Options,
) -> Digests:
    """Encode what neither source nor cache has; return the texts' digests."""
    cache = VectorCache(options.cache or folder / WORK, encoder.key, encoder.dimension)
    cache.read_into(source)
    digests = text_digests(encoder.key, texts)
    encode_missing(
        encoder, texts, digests, source, cache, progress=options.progress, label=f"encode ({name})"
    )
    return digests


def _given_digests(vectors: Vectors, source: VectorSource) -> Digests:
    """Know vectors that came from outside by what they are, as nobody can say of what texts."""
    digests = text_digests("given", [row.tobytes() for row in vectors])
    source.include(digests, vectors)
    return digests


def _write_encoder(
    part: Path,
    name: str,
    corpus: Corpus,
    passages: Passages,
    digests: Digests,
    source: VectorSource,
    record: EncoderRecord,
) -> None:
    path = part / VECTORS / f"{name}.npy"
    vectors = write_vectors(path, digests, source, record.dimension)
    write_passages(part, name, corpus, passages, digests, vectors)


Piece: TypeAlias = tuple[Rows, Passages, Digests]
"""Passages, the new row of each one's document, and their digests."""


def _carried(passages: Passages, digests: Digests, origin: Rows) -> Piece:
    """Take the passages of the documents that stay."""
    new_row = np.full(passages.documents, -1, dtype=np.int64)
    kept = np.flatnonzero(origin >= 0)
    new_row[origin[kept]] = kept
    rows = new_row[passages.document]
    stays = rows >= 0
    lead = None if passages.lead is None else passages.lead[stays]
    document = np.unique(passages.document[stays], return_inverse=True)[1].astype(np.int64)
    part = Passages(document, passages.start[stays], passages.stop[stays], lead)
    return rows[stays], part, digests[stays]


def _joined(pieces: Iterable[Piece]) -> tuple[Passages, Digests]:
    """Put passages into the order of their documents' new rows."""
    parts = list(pieces)
    rows = np.concatenate([rows for rows, _, _ in parts])
    order = np.argsort(rows, kind="stable")

    def column(name: str) -> Rows:
        columns = [
            np.zeros_like(p.start) if (values := getattr(p, name)) is None else values
            for _, p, _ in parts
        ]
        joined: Rows = np.concatenate(columns)[order]
        return joined

    passages = Passages(rows[order], column("start"), column("stop"), column("lead"))
    return passages, np.concatenate([digests for _, _, digests in parts])[order]
