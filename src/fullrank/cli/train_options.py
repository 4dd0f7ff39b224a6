"""Options that the commands of `fullrank train` share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from fullrank.training.lm_config import RunSettings

Run = TypeVar("Run", bound="RunSettings")

PLACEHOLDER = "FOLDER-OR-HUGGING-FACE-NAME"
"""What examples have in place of a model's name."""

Fresh = Annotated[bool, typer.Option("--fresh", help="Start again, whatever is in the folder.")]

RanksEvery = Annotated[
    int,
    typer.Option(
        help="Steps between two X-rays of the weights, for `fullrank see run DIR`.",
        show_default="none",
        min=0,
    ),
]


def settings(*sections: str) -> Any:
    """The file of settings, with these sections."""
    return typer.Argument(help=f"YAML or TOML file: {', '.join(sections)}.")


def read_run(kind: type[Run], config: Path, overrides: list[str] | None) -> Run:
    """Read the file of settings with what is changed of it."""
    from fullrank.core.errors import InputError

    run = kind.read(config, overrides or [])
    if run.as_dict()["model"]["name"] == PLACEHOLDER:
        raise InputError(
            f"model.name in {config} is still the example's: write the folder or the Hugging Face "
            "name of a model there, and in data.source what to train on"
        )
    return run


def changes(example: str) -> Any:
    """What is changed of the file."""
    return typer.Argument(help=f"section.key=value, e.g. {example}.")


def folder(what: str) -> Any:
    """Where the result goes."""
    return typer.Option(
        help=f"New folder for {what}; the same command goes on where it stopped.",
        show_default="the file's name without its ending",
    )


def shows(flag: str, what: str, text: Callable[[], str]) -> Any:
    """An option that prints a text and does nothing else."""

    def show(wanted: bool) -> None:
        if wanted:
            typer.echo(text().rstrip("\n"))
            raise typer.Exit

    return typer.Option(flag, help=f"Print {what}.", callback=show, is_eager=True)


def optimizer_list() -> str:
    """One optimizer's name a line."""
    from fullrank.training import optimizer_names

    return "\n".join(optimizer_names())


Optimizers = Annotated[bool, shows("--optimizers", "the optimizers' names", optimizer_list)]


def out_folder(out: Path | None, config: Path) -> Path:
    """Name the folder after the file of settings where no other name is given."""
    return Path(config.stem) if out is None else out
