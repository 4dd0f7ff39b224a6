"""The run of every stage inside a pipeline, not only the last one's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fullrank.core.run import Run

# Context-local, so that two searches in two threads never see each other's stages.
_seen: ContextVar[list[tuple[str, Run]] | None] = ContextVar("fullrank_stages", default=None)


@contextmanager
def observe_stages() -> Iterator[list[tuple[str, Run]]]:
    """Collect ``(name, run)`` of every stage that finishes inside, innermost first.

    A stage reports itself with :func:`stage_finished`; when nobody observes, that costs nothing
    and keeps nothing alive.

    Examples
    --------
    >>> from fullrank.core import Run
    >>> with observe_stages() as stages:
    ...     stage_finished("bm25", Run.from_dict({"q": {"d1": 2.0}}))
    >>> [(name, run.to_dict()) for name, run in stages]
    [('bm25', {'q': {'d1': 2.0}})]
    """
    stages: list[tuple[str, Run]] = []
    token = _seen.set(stages)
    try:
        yield stages
    finally:
        _seen.reset(token)


def stage_finished(name: str, run: Run) -> None:
    """Report what a stage gave, to whoever observes."""
    stages = _seen.get()
    if stages is not None:
        stages.append((name, run))
