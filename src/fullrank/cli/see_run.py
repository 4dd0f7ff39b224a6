"""`fullrank see run`: what a training run has logged, while it goes on or after."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Group

    from fullrank.spectra.run_log import RunLog


def run(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder of a run, finished or not.")
    ],
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on until the run ends, or Ctrl-C.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page of curves.")] = None,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Write scalars for TensorBoard into a folder.")
    ] = None,
    every: Annotated[
        float, typer.Option(help="Seconds between two looks of --watch.", min=0.1)
    ] = 2.0,
) -> None:
    """Show loss, metric, RankMe and effective ranks of a training run over its steps.

    Reads what fullrank train and Hugging Face's trainers leave in their folders. Effective ranks
    of the weights are there when fullrank.spectra.RunLogCallback is among a trainer's callbacks.

    Example: fullrank see run out --watch --html run.html
    """
    from contextlib import suppress

    from rich.live import Live

    from fullrank.core.errors import InputError
    from fullrank.core.table import wide_console
    from fullrank.spectra.run_log import read_run
    from fullrank.spectra.run_log_page import write_page, write_tensorboard

    console = wide_console()
    log = read_run(folder)
    if watch and not log.stopped:
        with Live(_shown(log), console=console, auto_refresh=False) as live:
            while not log.stopped:
                if html is not None:
                    write_page(log, html, refresh=max(1, round(every)))
                try:
                    time.sleep(every)
                except KeyboardInterrupt:
                    break
                # What can be read now may be less than there was: files are written and deleted.
                with suppress(InputError):
                    log = read_run(folder)
                live.update(_shown(log), refresh=True)
    else:
        console.print(_shown(log))
    if html is not None:
        console.print(f"written: {write_page(log, html)}")
    if tensorboard is not None:
        console.print(f"written: {write_tensorboard(log, tensorboard)}")


def _shown(log: RunLog) -> Group:
    from rich.console import Group

    parts: list[object] = [log.table()]
    if log.ranks:
        parts.append(log.rank_table())
    if log.damaged:
        parts.append(f"{log.damaged} damaged lines or files were left out")
    return Group(*parts)  # type: ignore[arg-type]
