"""`fullrank bench`: methods against each other, on equal terms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Compare methods on the same models and texts.")


@app.callback()
def group() -> None:
    """Compare methods on the same models and texts."""


@app.command()
def optimizers(
    size: Annotated[
        str,
        typer.Option(
            help="tiny (width 96, 2 layers, 3,000 steps: under 90 minutes on two cores), small "
            "(under 6 hours), or base (for a GPU)."
        ),
    ] = "tiny",
    text: Annotated[
        list[str] | None,
        typer.Option(
            help="What to train on, as for `fullrank train lm`; may be repeated. By default "
            "tinyshakespeare (from the folder that FULLRANK_DATA names) and python_source."
        ),
    ] = None,
    optimizer: Annotated[
        list[str] | None,
        typer.Option(help="Only this one, e.g. GaLoreAdamW; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results; the same command goes on where it stopped.",
            show_default="bench-optimizers-SIZE",
        ),
    ] = None,
    rates: Annotated[
        int | None, typer.Option(help="Learning rates of the grid.", show_default="3", min=1)
    ] = None,
    seeds: Annotated[
        int | None, typer.Option(help="Seeds at the best rate.", show_default="3", min=1)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Runs at a time.", show_default="one a core; 1 on a GPU", min=1),
    ] = None,
    threads: Annotated[int, typer.Option(help="Threads of each run.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    remeasure: Annotated[
        bool,
        typer.Option("--remeasure", help="Measure times and memory anew, on a quiet machine."),
    ] = False,
) -> None:
    """Train small language models with every optimizer; compare loss, memory and time.

    Example: fullrank bench optimizers --size tiny --text python_source
    """
    from rich.console import Console

    from fullrank.bench.optimizers import TEXTS, bench_optimizers
    from fullrank.bench.sizes import size_of

    folder = out or Path(f"bench-optimizers-{size}")
    board = bench_optimizers(
        folder,
        size=size_of(size, rates=rates, seeds=seeds),
        texts=text or TEXTS,
        optimizers=optimizer,
        workers=workers,
        threads=threads,
        device=device,
        remeasure=remeasure,
    )
    console = Console()
    for name in board.rows:
        console.print(board.table(name))
    console.print(f"{folder}: leaderboard.md, leaderboard.json, pictures, and all runs")
