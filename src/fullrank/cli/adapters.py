"""`fullrank adapters`: look into adapter folders, convert them to ordinary LoRA, merge them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fullrank.core.errors import InputError

app = typer.Typer(
    no_args_is_help=True,
    help="Look into adapter folders, convert them to ordinary LoRA, merge several into one.",
)

Folders = Annotated[
    list[Path],
    typer.Argument(help="Folders with adapter_config.json and adapter_model.safetensors."),
]
Out = Annotated[Path, typer.Option(help="New folder for the LoRA adapter.")]
Base = Annotated[
    str | None,
    typer.Option(
        help="Folder or Hugging Face name of the base model; only adapters that are no LoRA need "
        "it.",
        show_default="the one the adapter names",
    ),
]


@app.callback()
def adapters() -> None:
    """Look into adapter folders, convert them to ordinary LoRA, merge several into one."""


@app.command()
def inspect(folders: Folders) -> None:
    """Show what is in adapter folders: layers, shapes, ranks, numbers, norms of the updates.

    Reads the files alone, without the base model: fullrank adapters inspect tuned other
    """
    from fullrank.adapters import inspect as look

    console = Console()
    for folder in folders:
        console.print(look(folder))


@app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="Folder with the adapter.")],
    out: Out,
    base: Base = None,
) -> None:
    """Write an adapter as an ordinary LoRA, which plain PEFT and vLLM-like loaders take.

    Ranks, scalings (rank-stabilised too) and patterns are folded into the factors. An adapter
    whose update is not of low rank (DoRA, ...) is refused: merge it into its base instead, with
    peft's merge_and_unload.

    Example: fullrank adapters convert tuned --out tuned-lora
    """
    from fullrank.adapters import inspect as look
    from fullrank.adapters import read_lora, save_as_lora, write_lora
    from fullrank.adapters.loading import how_to_load, load_adapter
    from fullrank.adapters.lora_reading import read_config

    _free(out)
    if read_config(folder).get("peft_type") == "LORA":
        updates, whole, config = read_lora(folder)
        write_lora(out, updates, config, whole)
    else:
        save_as_lora(load_adapter(folder, base), out)
    console = Console()
    console.print(look(out))
    console.print(f"{out} loads with {how_to_load(out)}")


@app.command()
def merge(
    folders: Folders,
    out: Out,
    weights: Annotated[
        str | None,
        typer.Option(help="One an adapter, e.g. 0.7,0.3.", show_default="equal, of sum 1"),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(
            help="Largest rank of a merged layer.", min=1, show_default="what loses nothing"
        ),
    ] = None,
    base: Base = None,
) -> None:
    """Merge several adapters of one base model into one: the weighted sum of their updates.

    Sums products B A, never factors; with --rank, keeps the best approximation and says what it
    lost. FlyLoRA's experts are put side by side instead, which loses nothing.

    Example: fullrank adapters merge math code --weights 0.5,0.5 --rank 16 --out both
    """
    from fullrank.adapters import merge_updates, read_lora, to_lora, write_lora
    from fullrank.adapters.loading import how_to_load, load_adapter
    from fullrank.adapters.lora_reading import read_config

    _free(out)
    if len(folders) < 2:
        raise InputError("give at least two folders; one alone is changed by convert")
    if {read_config(folder).get("peft_type") for folder in folders} == {"FULLRANK_FLYLORA"}:
        _side_by_side(folders, out, _numbers(weights), rank, base)
        return
    updates, configs = [], []
    for folder in folders:
        if read_config(folder).get("peft_type") == "LORA":
            found, whole, config = read_lora(folder)
        else:
            model = load_adapter(folder, base)
            found, whole, config = to_lora(model), {}, model.peft_config["default"]
        if whole or getattr(config, "modules_to_save", None):
            raise InputError(
                f"{folder} also trained {', '.join(config.modules_to_save or ())} whole; the sum "
                "of classifiers is no classifier: merge adapters without one"
            )
        updates.append(found)
        configs.append(config)
    bases = {c.base_model_name_or_path for c in configs if c.base_model_name_or_path}
    if len(bases) > 1:
        typer.echo(
            f"fullrank: the adapters name different base models ({', '.join(sorted(bases))}); "
            "their sum means something only where these are the same weights",
            err=True,
        )
    report = merge_updates(updates, _numbers(weights), rank)
    write_lora(out, report.updates, configs[0])
    console = Console()
    console.print(report.table())
    console.print(f"{out} loads with {how_to_load(out)}")


def _side_by_side(
    folders: list[Path],
    out: Path,
    weights: list[float] | None,
    rank: int | None,
    base: str | None,
) -> None:
    from fullrank.adapters import merge_adapters
    from fullrank.adapters.loading import how_to_load, load_adapter, save_alone

    model = load_adapter(folders[0], base)
    names = ["default"]
    for number, folder in enumerate(folders[1:], 1):
        names.append(f"task{number}")
        model.load_adapter(str(folder), names[-1])
    report = merge_adapters(model, names, weights, rank=rank)
    save_alone(model, "merged", out)
    console = Console()
    console.print(report.table())
    console.print(f"{out} loads with {how_to_load(out)}")


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights {text!r}: give numbers with commas, e.g. 0.7,0.3") from None


def _free(out: Path) -> None:
    """Raise before work starts when a folder is taken."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise InputError(f"{out} is there already; give a new folder")
