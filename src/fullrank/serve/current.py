"""What is served now: an index that others may change while it is searched."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Protocol, runtime_checkable

from fullrank.core.corpus import Corpus
from fullrank.core.errors import FullrankError, InputError
from fullrank.core.run import Run

logger = logging.getLogger("fullrank.serve")


class Searchable(Protocol):
    """What can be served: :class:`fullrank.retrieval.Index` is one."""

    @property
    def corpus(self) -> Corpus:
        """The documents."""

    @property
    def systems(self) -> Mapping[str, object]:
        """What can be searched with, by name: ``KIND`` or ``KIND:ENCODER``."""

    @property
    def encoders(self) -> Mapping[str, object]:
        """The encoders by name; systems that name none use the first."""

    @property
    def default_system(self) -> str:
        """The system used when none is named."""

    def search(self, query: str, k: int, *, system: str) -> Run:
        """Return the best ``k`` documents for one query, with a trace of the stages."""

    def snippets(self, query: str, documents: Sequence[str], *, system: str) -> Sequence[str]:
        """Return the part of each document that answers the query.

        The strings may carry ``highlights``: disjoint ranges ``(start, stop)`` of the query's
        words in them, in order.
        """


@runtime_checkable
class Changing(Protocol):
    """What is served and may be changed by others; :class:`fullrank.retrieval.Index` is one."""

    def refresh(self) -> bool:
        """See what others have written since."""

    def snapshot(self) -> Searchable:
        """Return what is seen now, and stays as it is."""

    def warm(self, system: str | None = None) -> None:
        """Load what a system needs."""


@dataclass(frozen=True)
class Served:
    """One state of an index, from which a whole answer is made."""

    index: Searchable
    corpus: Corpus
    systems: tuple[str, ...]
    default: str

    @classmethod
    def of(cls, index: Searchable) -> Served:
        """Look at an index, and check that it can be searched."""
        systems, default = tuple(index.systems), index.default_system
        if not systems:
            raise InputError("the index has no system to search with")
        if default not in systems:
            raise InputError(f"the default system {default!r} is none of {systems}")
        return cls(index, index.corpus, systems, default)


class Current:
    """The newest state of an index, looked for now and then.

    One caller looks and loads; the others go on with the state before, which goes when the last
    answer made from it does. A state that cannot be read is not taken.

    Parameters
    ----------
    index
        What is served.
    every
        Seconds between looks.
    """

    def __init__(self, index: Searchable, every: float = 1.0) -> None:
        self._changing = index if isinstance(index, Changing) else None
        self._every = every
        self._state = Served.of(self._changing.snapshot() if self._changing else index)
        self._looked, self._looking = monotonic(), threading.Lock()
        self._said = ""

    def __call__(self) -> Served:
        """Return the state to make an answer from."""
        due = self._changing and monotonic() - self._looked >= self._every
        if due and self._looking.acquire(blocking=False):
            try:
                self._look()
            except (FullrankError, OSError) as error:
                self._warn(f"goes on with the index as it was: {error}")
            finally:
                self._looked = monotonic()
                self._looking.release()
        return self._state

    def _look(self) -> None:
        assert self._changing is not None
        self._changing.refresh()
        new = Served.of(self._changing.snapshot())
        if new.corpus is self._state.corpus:
            return
        # Loaded before it is swapped in, so that nobody else waits for it.
        len(new.corpus)
        try:
            self._changing.warm(new.default)
        except FullrankError as error:
            self._warn(str(error))
        self._state = new
        logger.info("serves %d documents now", len(new.corpus))

    def _warn(self, text: str) -> None:
        if text != self._said:  # not once a second
            logger.warning("%s", text)
            self._said = text
