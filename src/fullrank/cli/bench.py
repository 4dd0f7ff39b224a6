"""`fullrank bench`: methods against each other, on equal terms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="Compare methods on the same models and texts.")


Seeds = Annotated[int | None, typer.Option(help="Seeds at the best rate.", show_default="3", min=1)]
Workers = Annotated[
    int | None, typer.Option(help="Runs at a time.", show_default="one a core; 1 on a GPU", min=1)
]
Threads = Annotated[int, typer.Option(help="Threads of each run.", min=1)]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Remeasure = Annotated[
    bool, typer.Option("--remeasure", help="Measure times and memory anew, on a quiet machine.")
]


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
    seeds: Seeds = None,
    workers: Workers = None,
    threads: Threads = 1,
    device: Device = "cpu",
    remeasure: Remeasure = False,
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


@app.command()
def adapters(
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="digits (an MLP to turned digits: 2 minutes on two cores), retrieval (the "
            "embedded encoder to pydocs, and what it forgets on Vaswani and Cranfield: an "
            "hour) or language (a language model of Python source to GSM8K: an hour); may "
            "be repeated. All by default; Vaswani, Cranfield and GSM8K are read from the folder "
            "that FULLRANK_DATA names."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this one: a method of `fullrank train finetune --adapters`, lora_pro, or "
            "full; may be repeated."
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few steps, rates and seeds: shows that all runs.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results; the same command goes on where it stopped.",
            show_default="bench-adapters, or bench-adapters-quick",
        ),
    ] = None,
    rates: Annotated[
        int | None, typer.Option(help="Learning rates of the grid.", show_default="all", min=1)
    ] = None,
    seeds: Seeds = None,
    workers: Workers = None,
    threads: Threads = 1,
    device: Device = "cpu",
    remeasure: Remeasure = False,
) -> None:
    """Fine-tune the same bases with every adapter; compare quality, sizes, memory and time.

    Each is tried at the same learning rates on one seed, then at its best one on more seeds.

    Example: fullrank bench adapters --task digits --method lora --method eva
    """
    from rich.console import Console

    from fullrank.bench.adapter_sizes import TASKS, adapter_size
    from fullrank.bench.adapters import bench_adapters

    folder = out or Path("bench-adapters-quick" if quick else "bench-adapters")
    boards = bench_adapters(
        folder,
        tasks=[adapter_size(t, quick=quick, rates=rates, seeds=seeds) for t in task or TASKS],
        methods=method,
        workers=workers,
        threads=threads,
        device=device,
        remeasure=remeasure,
    )
    console = Console()
    for board in boards.values():
        console.print(board.table())
        console.print(board.costs())
    console.print(f"{folder}: a table, figures and a picture for each task, and all runs")


@app.command()
def shrink(
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help="Small networks, little data, few steps: minutes in place of hours, to see how "
            "it works. Its figures say little.",
        ),
    ] = False,
    subject: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this model; may be repeated. cifar10: a ResNet on images; lm: a language "
            "model over bytes on tinyshakespeare; vaswani, cranfield, pydocs: the embedded "
            "encoder on that collection. All but pydocs are read from the folder that "
            "FULLRANK_DATA names."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="Only this method, e.g. lord; may be repeated. All differences are to "
            "pca-uniform, feature PCA with the same share for every layer: keep it among them."
        ),
    ] = None,
    share: Annotated[
        list[float] | None,
        typer.Option(
            help="Share of the layers' parameters to keep; may be repeated.",
            show_default="0.9 0.75 0.6 0.5 0.4",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the results; the same command goes on where it stopped.",
            show_default="bench-shrink-full, or -quick",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(help="Runs at a time.", min=1)] = 1,
    threads: Annotated[int, typer.Option(help="Threads of each run.", min=1)] = 1,
) -> None:
    """Shrink trained models by every method to equal sizes; compare quality, bytes and speed.

    Each model is measured in one shot and after equally long fine-tuning, with intervals.

    Example: fullrank bench shrink --quick --subject cifar10 --share 0.5
    """
    from rich.console import Console

    from fullrank.bench.shrink import bench_shrink
    from fullrank.bench.shrink_sizes import shrink_size
    from fullrank.bench.shrink_table import QUALITY

    size = shrink_size("quick" if quick else "full", tuple(share) if share else None)
    folder = out or Path(f"bench-shrink-{size.name}")
    found = bench_shrink(
        folder, size=size, subjects=subject, methods=method, workers=workers, threads=threads
    )
    console = Console()
    for name in found.rows:
        console.print(found.table(name, QUALITY))
    console.print(f"{folder}: shrink.md with all columns, shrink.json, pictures, and all runs")
