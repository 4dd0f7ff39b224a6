"""Progress bars on long work: on standard error, off where nobody looks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
        False shows nothing; neither does a standard error that is not a terminal.
    unit
        What is counted, e.g. ``"docs"``.

    Examples
    --------
    >>> with progress("encode", total=10, enabled=False) as advance:
    ...     advance(10)
    """
    if not enabled or not sys.stderr.isatty():
        yield lambda n: None
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
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(description, total=total)
        yield lambda n: bar.advance(task, n)
