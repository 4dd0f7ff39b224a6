"""How much one request, and all of them together, may ask for."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fullrank.core.errors import InputError

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
"""Names under which a server on this machine is reached by this machine."""


def cpus() -> int:
    """Cores that this process may use, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _workers() -> int:
    # Beyond a few searches at a time, a CPU only switches between them.
    return min(4, cpus())


@dataclass(frozen=True)
class Limits:
    """Bounds of the HTTP API. What exceeds one is answered with 4xx and the reason.

    Parameters
    ----------
    max_query
        Characters (code points) of a query.
    max_k
        Results of one search.
    max_body
        Bytes of a request's body.
    max_url
        Bytes of a request's path and query string.
    concurrency
        Searches that run at the same time; by default one per CPU core, at most 4.
    queue
        Searches that wait for one of those to end. One more is answered with 429.
    patience
        Seconds a search waits, or a client takes to send its body, before it is turned away.
    max_document
        Characters of a document that are shown.

    Raises
    ------
    InputError
        When a bound is below 1 (``queue``: below 0).

    Examples
    --------
    >>> Limits(max_k=20).max_k
    20
    """

    max_query: int = 1000
    max_k: int = 100
    max_body: int = 64 * 1024
    max_url: int = 16 * 1024
    concurrency: int = field(default_factory=_workers)
    queue: int = 32
    patience: float = 5.0
    max_document: int = 100_000

    def __post_init__(self) -> None:
        for name in ("max_query", "max_k", "max_body", "max_url", "concurrency", "max_document"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.queue < 0 or not self.patience > 0:
            raise InputError("queue must be at least 0 and patience above 0 seconds")


class BusyError(Exception):
    """More searches are wanted than may run and wait."""


class Gate:
    """Lets ``concurrency`` searches in, ``queue`` wait, and turns the rest away at once.

    Turning away early keeps the memory and the waiting time of a server bounded, whatever the
    number of its clients.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._waiting = 0

    @asynccontextmanager
    async def __call__(self) -> AsyncIterator[bool]:
        """Hold a slot; yields whether it had to be waited for.

        Raises
        ------
        BusyError
            When the queue is full or the wait was too long.
        """
        waited = self._slots.locked()
        if waited and self._waiting >= self._limits.queue:
            raise BusyError
        self._waiting += 1
        try:
            async with asyncio.timeout(self._limits.patience):
                await self._slots.acquire()
        except TimeoutError:
            raise BusyError from None
        finally:
            self._waiting -= 1
        try:
            yield waited
        finally:
            self._slots.release()
