"""`fullrank see data`: two instruction data sets, by the gradients of their examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def data(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A causal language model: a folder or a name.")
    ],
    first: Annotated[
        Path,
        typer.Argument(
            metavar="FILE_A",
            help="JSON list or JSON lines: instruction (or prompt), maybe input, and response (or "
            "output).",
        ),
    ],
    second: Annotated[
        Path | None,
        typer.Argument(
            metavar="[FILE_B]", help="Compared with the first; alone, the first is scored."
        ),
    ] = None,
    tokens: Annotated[
        int,
        typer.Option(
            help="Tokens of each response that are scored, shorter ones left out; 0: all of them, "
            "whose number alone moves both measures.",
            min=0,
        ),
    ] = 64,
    samples: Annotated[
        int | None, typer.Option(help="Examples of each file, at most.", min=2, show_default="all")
    ] = None,
    modules: Annotated[
        str, typer.Option(help="attention, or a regular expression over names of linear layers.")
    ] = "attention",
    chat: Annotated[bool, typer.Option("--chat", help="Use the chat template.")] = False,
    max_length: Annotated[int, typer.Option(help="Tokens of prompt and response.", min=2)] = 4096,
    ifd: Annotated[
        bool,
        typer.Option(
            "--ifd",
            help="Instruction-following difficulty too: by how much the prompt lowers the "
            "response's perplexity.",
        ),
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Write a page with violin plots.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the scores (JSON lines); the same command goes on where it stopped."
        ),
    ] = None,
) -> None:
    """Judge instruction data by what each example would change in a model.

    One backward pass an example: the nuclear norm of the gradients says how hard it pushes the
    weights, their effective rank in how many directions. Data of higher quality tends to push less
    hard and in more directions; so do longer responses, hence --tokens.

    Example: fullrank see data my-model good.jsonl bad.jsonl --html data.html
    """
    import fullrank  # noqa: F401
    from fullrank.core.errors import InputError, require
    from fullrank.core.models import load_model
    from fullrank.core.table import wide_console
    from fullrank.spectra.gradient_comparison import MEASURES, Comparison
    from fullrank.spectra.gradient_examples import read_examples
    from fullrank.spectra.gradient_quality import GradientQuality
    from fullrank.spectra.gradient_scores import with_ifd

    if html is not None and second is None:
        raise InputError("--html compares two files; give FILE_B")
    files = [first] if second is None else [first, second]
    sets = [read_examples(path)[:samples] for path in files]
    transformers = require("transformers", extra="hf")
    loader = transformers.AutoModelForCausalLM.from_pretrained
    network = load_model(model, lambda source: loader(source, dtype="float32"))
    tokenizer = load_model(model, transformers.AutoTokenizer.from_pretrained)
    template: Literal["chat"] | None = "chat" if chat else None
    quality = GradientQuality(network, tokenizer, max_length, modules, tokens or None, template)
    if ifd:
        sets = [
            with_ifd(network, tokenizer, s, max_length=quality.max_length, template=template)
            for s in sets
        ]
    found = [
        quality.score(s, out=place) for s, place in zip(sets, _places(files, out), strict=True)
    ]
    console = wide_console()
    one_name = second is not None and first.stem == second.stem
    names = [str(path) if one_name else path.stem for path in files]
    compared = None
    if second is None:
        console.print(found[0].table())
        console.print(found[0].correlations())
    else:
        compared = Comparison((names[0], names[1]), (found[0], found[1]), tokens or None)
        for measure in MEASURES:
            console.print(compared.table(measure))
    for scores, name in zip(found, names, strict=True):
        if scores.skipped:
            reasons = sorted(set(scores.skipped.values()))
            console.print(f"{name}: {len(scores.skipped)} left out ({'; '.join(reasons[:3])})")
    if html is not None and compared is not None:
        console.print(f"written: {compared.to_html(html)}")


def _places(files: list[Path], out: Path | None) -> list[Path | None]:
    """Where the scores of each file go: under its name, the second of one name as `name-2`."""
    if out is None:
        return [None for _ in files]
    names = [path.stem for path in files]
    if len(set(names)) < len(names):
        names[1] += "-2"
    return [out / f"{name}.jsonl" for name in names]
