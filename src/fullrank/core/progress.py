"""Progress of long work on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

# Seconds between two lines where there is no terminal: short work has none, a log stays readable.
_LINES_EVERY = 30.0


@contextmanager
def progress(
    description: str, total: int | None, enabled: bool = True, unit: str = ""
) -> Iterator[Callable[[int], None]]:
    """Show a bar with speed and time left; yields ``advance(n)``.

    Parameters
    ----------
    description
        What is being done, in a few words.
    total
        Number of units, or None when it is not known.
    enabled
        False shows nothing. A standard error that is no terminal gets a line now and then.
    unit
        What is counted, e.g. ``"docs"``.

    Examples
    --------
    >>> with progress("encode", total=10, enabled=False) as advance:
    ...     advance(10)
    """
    if not enabled:
        yield lambda n: None
        return
    if not sys.stderr.isatty():
        yield _lines(description, total, unit)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TextColumn("elapsed"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)


def _lines(description: str, total: int | None, unit: str) -> Callable[[int], None]:
    """Return ``advance(n)`` that prints how far it is, at most so often."""
    began = said = time.monotonic()
    done = 0

    def advance(n: int) -> None:
        nonlocal done, said
        done += n
        now = time.monotonic()
        if now - said < _LINES_EVERY:
            return
        said, gone = now, now - began
        counted = f"{done:,}" if total is None else f"{done:,}/{total:,}"
        left = f", left {_time(gone * (total - done) / done)}" if total and done else ""
        line = f"{description}: {counted} {unit}".rstrip()
        print(f"{line}, elapsed {_time(gone)}{left}", file=sys.stderr, flush=True)

    return advance


def _time(seconds: float) -> timedelta:
    return timedelta(seconds=max(0, round(seconds)))
