"""`Index`: a folder that holds documents, their vectors and everything needed to search them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fullrank.core.corpus import Corpus, Document, Queries
from fullrank.core.errors import InputError
from fullrank.core.models import DEFAULT_ENCODER
from fullrank.core.run import Run
from fullrank.retrieval.index_build import (
    Options,
    build,
    changing,
    checked_documents,
    rewrite,
)
from fullrank.retrieval.index_encoders import Encoders, StoredEncoder, load_encoders, named_encoders
from fullrank.retrieval.index_filters import Where
from fullrank.retrieval.index_manifest import Manifest, Settings, read_manifest, write_manifest
from fullrank.retrieval.index_snippet import Snippet, best_snippet
from fullrank.retrieval.index_store import sweep, verify_files
from fullrank.retrieval.index_systems import (
    best_parts,
    checked_settings,
    default_system,
    load_for,
    make_system,
    parse_system,
    system_names,
)
from fullrank.retrieval.index_view import View
from fullrank.retrieval.retriever import check_depth, readable
from fullrank.retrieval.stages import Stage, check_queries

QUERY = "q"
"""Id of the query in the run of a search for a single text."""


class Index:
    """Documents in a folder, searchable by words and by the vectors of any number of encoders.

    Make one with :meth:`create` or :meth:`open`. The folder can be moved and copied, and read
    where it cannot be written to. Any number of threads and processes may search while one writes:
    a change is a new generation beside the old one and becomes the index in one step, so that
    an interruption, a full disk or a crash leaves the index as it was. An open index goes on
    with the state that it was opened in until :meth:`refresh`; a :meth:`snapshot` keeps its own.

    Examples
    --------
    >>> import tempfile
    >>> corpus = Corpus(["a", "b"], ["singular values of a matrix", "a recipe for bread"])
    >>> index = Index.create(tempfile.mkdtemp(), corpus, encoders=None)
    >>> index.search("which matrix")["q"].ids.tolist()
    ['a']
    >>> index.add([Document("c", "the rank of a matrix")])
    >>> len(Index.open(index.folder)), index.default_system
    (3, 'bm25')
    """

    def __init__(self, folder: Path, models: Mapping[str, Any] | None = None) -> None:
        self.folder = folder = folder.absolute()  # whatever directory a later search is made in
        self._models = dict(models or {})
        self._view = View(folder, self._models)
        if unknown := set(self._models) - set(self._view.encoders):
            raise InputError(
                f"{folder} has no encoder {min(unknown)!r}; it has "
                f"{', '.join(self._view.encoders) or 'none'}"
            )
        self._swapping = threading.Lock()

    # -- making and opening ----------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: str | Path,
        corpus: Corpus,
        encoders: Encoders = DEFAULT_ENCODER,
        *,
        bm25: Mapping[str, Any] | None = None,
        settings: Mapping[str, Any] | Settings | None = None,
        vectors: Mapping[str, Any] | None = None,
        cache: str | Path | None = None,
        progress: bool = True,
    ) -> Index:
        """Index a corpus.

        Parameters
        ----------
        folder
            New, empty, or an index, which is replaced when the new one is whole. When that was
            interrupted, doing it again goes on where it was.
        corpus
            The documents.
        encoders
            A model name, a folder, an :class:`~fullrank.retrieval.Encoder` or a
            ``SentenceTransformer``; a mapping from names to these; or None for words only. The
            index refers to models that have a name or a folder, relative to itself when they lie
            inside its parent folder, and copies those that are only in memory.
        bm25
            Options of :class:`~fullrank.retrieval.BM25`.
        settings
            How systems are put together: see :class:`Settings`.
        vectors
            Encoder name -> ``(documents, d)`` vectors, a row a document, if they are there
            already. Documents are not split then.
        cache
            A folder of encoded texts that is read and added to, for several indexes to share.
        progress
            Whether to show bars.

        Raises
        ------
        InputError
            For a model that is not there, options or vectors that do not fit.
        StoreError
            When the folder holds something else, or cannot be written to.
        LockedError
            When another process is writing to it.
        """
        path = Path(folder).expanduser()
        given = named_encoders(encoders)
        loaded = load_encoders(given)
        options = Options(Path(cache) if cache else None, progress, vectors or {})
        chosen = checked_settings(settings or {}, list(loaded))
        build(path, corpus, loaded, dict(bm25 or {}), chosen, options)
        index = cls(path)
        for name, encoder in loaded.items():
            # One that belongs to the caller may be trained on: the index loads its own.
            if encoder is not given[name]:
                index._view.encoders[name].adopt(encoder)
        return index

    @classmethod
    def open(cls, folder: str | Path, *, encoders: Mapping[str, Any] | None = None) -> Index:
        """Open an index. Models are loaded when a search first needs them.

        Parameters
        ----------
        folder
            Where it is.
        encoders
            Where to take the models of some encoders from, if they are not where they were.

        Raises
        ------
        StoreError
            When there is no index, a newer version wrote it, or it is damaged: a file is missing
            or has another size. (:meth:`verify` looks at every byte.)
        """
        return cls(Path(folder).expanduser(), encoders)

    def refresh(self) -> bool:
        """See what others have written since; tell whether there was anything."""
        with self._swapping:
            if read_manifest(self.folder) == self._view.manifest:
                return False
            self._view = View(self.folder, self._models, before=self._view)
            return True

    def snapshot(self) -> Index:
        """Return the index as it is seen now; what is refreshed or changed here does not move it.

        Several calls, e.g. a search and its snippets, then see the same documents. It shares all
        that is loaded, and costs nothing.
        """
        same = copy.copy(self)
        same._swapping = threading.Lock()
        return same

    # -- what is in it ---------------------------------------------------------------------

    def __len__(self) -> int:
        return self._view.manifest.documents

    def __repr__(self) -> str:
        names = ", ".join(self.encoders) or "none"
        return f"Index({str(self.folder)!r}, {len(self)} documents, encoders: {names})"

    @property
    def manifest(self) -> Manifest:
        """What the folder says about itself."""
        return self._view.manifest

    @property
    def settings(self) -> Settings:
        """How systems are put together; :meth:`configure` changes it."""
        return self._view.manifest.settings

    @property
    def corpus(self) -> Corpus:
        """The documents, read when they are first looked at."""
        return self._view.corpus

    @property
    def encoders(self) -> Mapping[str, StoredEncoder]:
        """The encoders whose vectors are stored, by name."""
        return MappingProxyType(self._view.encoders)

    @property
    def systems(self) -> Mapping[str, Stage]:
        """Ready-made pipelines by name, in the order of menus.

        ``"bm25"``, ``"dense"``, ``"rrf"``, ``"weighted"`` and ``"feedback"`` (the pseudo-query
        over what the fusion found). With several encoders each has its own, named
        ``"dense:NAME"`` and so on; without any there is only ``"bm25"``.
        """
        view = self._view
        return {name: make_system(name, view) for name in system_names(list(view.encoders))}

    @property
    def default_system(self) -> str:
        """The system that answers when none is asked for."""
        return default_system(self._view)

    # -- searching -------------------------------------------------------------------------

    def search(
        self,
        query: str | Queries,
        k: int = 10,
        *,
        system: str | None = None,
        where: Where | None = None,
    ) -> Run:
        """Search for one query or for many.

        Parameters
        ----------
        query
            A text, answered under the query id ``"q"``, or query id -> text. Among many, one
            without visible characters finds nothing.
        k
            How many documents a query, at most.
        system
            One of :attr:`systems`.
        where
            Which documents may be found: ``{"field": value}``, ``{"field": [one, or, other]}``,
            ``{"field": {">=": low, "<": high}}``, or text such as ``"year>=2020"``. Without any
            condition (``{}``) all may.

        Raises
        ------
        InputError
            For an empty query, an unknown system, a filter that does not fit the metadata.
        StoreError
            When a model is not where it was, or has changed.
        """
        queries = {QUERY: query} if isinstance(query, str) else query
        check_queries(queries)
        k = check_depth(k)
        view = self._view
        name = default_system(view) if system is None else system
        parse_system(name, view)
        if isinstance(query, str) and not query.strip():
            raise InputError("the query is empty; give at least one word")
        mask = None if where is None else view.mask(where)
        load_for(name, view)
        depth = max(k, view.manifest.settings.depth)
        # What came in as broken Unicode is searched for as far as it is readable.
        asked = {q: readable(text) for q, text in queries.items() if text.strip()}
        run = make_system(name, view, depth=depth, mask=mask)(asked).top(k)
        if len(asked) == len(queries):
            return run
        found: dict[str, tuple[Any, Any]] = dict.fromkeys(queries, ((), ()))
        found |= {q: (run[q].ids, run[q].scores) for q in run}
        return Run(found, name=run.name, trace=run.trace, ordered=True)

    def snippet(
        self, query: str, document: str, *, system: str | None = None, width: int = 240
    ) -> Snippet:
        """Return the part of a document that shows best why a system found it for a query.

        A system with an encoder shows a document of several passages by the one nearest to the
        query. The string has at most ``width`` characters; it knows its place in the text and
        what to highlight.
        """
        return self.snippets(query, [document], system=system, width=width)[0]

    def snippets(
        self, query: str, documents: Sequence[str], *, system: str | None = None, width: int = 240
    ) -> list[Snippet]:
        """Return a :meth:`snippet` of each of the documents that a query found."""
        view = self._view
        query = readable(query)
        name = default_system(view) if system is None else system
        found = [view.corpus[document] for document in documents]
        parts = best_parts(name, view, query, documents)
        return [
            best_snippet(query, document, within=part, width=width)
            for document, part in zip(found, parts, strict=True)
        ]

    def warm(self, system: str | None = None) -> None:
        """Load now what a system needs, so that its first search is as fast as others."""
        view = self._view
        load_for(default_system(view) if system is None else system, view)

    # -- changing --------------------------------------------------------------------------

    def add(self, documents: Iterable[Document] | Corpus, *, progress: bool = True) -> None:
        """Add documents; only they are encoded.

        Raises
        ------
        InputError
            When an id is in the index already, or occurs twice.
        StoreError
            When the index is damaged or cannot be written to.
        LockedError
            When another process is writing to it.
        """
        new = checked_documents(documents)
        with self._changing() as view:
            if known := [i for i in new if i in view.corpus]:
                raise InputError(
                    f"{len(known)} documents are in the index already, e.g. {known[0]!r}; "
                    "use update to replace them"
                )
            rewrite(view, new, (), Options(progress=progress))

    def update(self, documents: Iterable[Document] | Corpus, *, progress: bool = True) -> None:
        """Replace documents of the same id, where they stand, and add the others at the end.

        Raises as :meth:`add`, except that known ids are fine.
        """
        new = checked_documents(documents)
        with self._changing() as view:
            rewrite(view, new, (), Options(progress=progress))

    def delete(self, ids: Iterable[str]) -> None:
        """Delete documents.

        Raises
        ------
        InputError
            For an id that is not in the index, or when none would be left.
        StoreError, LockedError
            As :meth:`add`.
        """
        gone = [ids] if isinstance(ids, str) else list(dict.fromkeys(ids))
        with self._changing() as view:
            if unknown := [i for i in gone if i not in view.corpus]:
                raise InputError(
                    f"{len(unknown)} ids are not in the index, e.g. {unknown[0]!r}; "
                    "nothing was deleted"
                )
            if len(gone) == len(view.corpus):
                raise InputError("this would delete every document; remove the folder instead")
            rewrite(view, {}, gone, Options(progress=False))

    def configure(self, **settings: Any) -> None:
        """Change how systems are put together, for good: see :class:`Settings`.

        Raises
        ------
        InputError
            For an unknown setting or a value that it cannot have.
        """
        with self._changing(check=False) as view:
            merged = {**view.manifest.settings.model_dump(), **settings}
            chosen = checked_settings(merged, list(view.encoders))
            write_manifest(self.folder, view.manifest.model_copy(update={"settings": chosen}))

    def verify(self) -> None:
        """Read every file and compare it with its checksum.

        Raises
        ------
        StoreError
            For the first that is not as it was written.
        """
        view = self._view
        verify_files(view.folder, view.manifest)

    @contextmanager
    def _changing(self, check: bool = True) -> Iterator[View]:
        """Be the only writer; afterwards see what was written, and remove what it replaced."""
        with changing(self.folder, self._models, before=self._view, check=check) as view:
            yield view
            view.close()
            with self._swapping:
                self._view = View(self.folder, self._models, before=view)
            sweep(self.folder)
