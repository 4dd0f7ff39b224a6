"""`fullrank train`: fine-tune a model on judged data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fullrank.cli.train_finetune import finetune
from fullrank.cli.train_lm import lm
from fullrank.cli.train_options import Fresh, RanksEvery
from fullrank.cli.train_rl import rl
from fullrank.core.errors import InputError
from fullrank.core.models import DEFAULT_ENCODER, find_model

app = typer.Typer(no_args_is_help=True, help="Train a model in little memory.")


@app.callback()
def train() -> None:
    """Train a model in little memory."""


app.command("lm")(lm)
app.command("finetune")(finetune)
app.command("rl")(rl)


@app.command()
def encoder(
    data: Annotated[
        str,
        typer.Argument(
            help="Documents with judged queries: pydocs, cranfield, vaswani, a BEIR folder, or "
            "ir_datasets:ID."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(help="New folder for the model; the same command goes on where it stopped."),
    ],
    model: Annotated[
        str, typer.Option(help="Encoder: a folder, a Hugging Face id, or the embedded one.")
    ] = DEFAULT_ENCODER,
    seconds: Annotated[
        float,
        typer.Option(
            help="Time to train for, evaluations included; 0 for no limit. One step and "
            "its evaluation always run.",
            min=0,
        ),
    ] = 150.0,
    epochs: Annotated[float, typer.Option(help="Passes over the pairs, at most.")] = 4.0,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimizer steps, at most; instead of --epochs.", min=1)
    ] = None,
    optimizer: Annotated[
        str, typer.Option(help="galore_adamw (state in a subspace) or adamw.")
    ] = "galore_adamw",
    lr: Annotated[
        float | None, typer.Option(help="Peak learning rate; by default what suits the optimizer.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="Rank of GaLore's subspaces.", show_default="64")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Pairs a step.", min=2)] = 32,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a text while training.", min=3)] = 64,
    hard_negatives: Annotated[
        int, typer.Option(help="Documents a pair that BM25 ranks high but nobody judged.", min=0)
    ] = 1,
    metric: Annotated[
        str, typer.Option(help="Measured on the dev part; the best weights are kept.")
    ] = "nDCG@10",
    select: Annotated[
        str,
        typer.Option(
            help="metric, or rankme: keep the weights whose vectors have the highest effective "
            "rank, which needs no labels. It warns of collapse; noise and too little training "
            "raise it too (over learning rates it picked no better than chance)."
        ),
    ] = "metric",
    patience: Annotated[
        int, typer.Option(help="End after so many evaluations without a new best; 0: never.", min=0)
    ] = 3,
    freeze_embeddings: Annotated[
        bool, typer.Option(help="Leave the token embeddings as they are.")
    ] = True,
    device: Annotated[
        str | None, typer.Option(help="cpu or cuda.", show_default="a GPU if there is one")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of order, negatives and samples.", min=0)] = 0,
    fresh: Fresh = False,
    ranks_every: RanksEvery = 0,
) -> None:
    """Fine-tune a dense encoder so that queries find the documents judged relevant to them.

    Example: fullrank train encoder pydocs --out tuned --seconds 150
    """
    from fullrank.training import EncoderTraining, train_encoder
    from fullrank.training.finetune_data import read_judged

    chosen: dict[str, Any] = {"lr": lr, "rank": rank}
    config = EncoderTraining(
        optimizer=optimizer,  # type: ignore[arg-type]
        seconds=seconds or None,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        max_tokens=max_tokens,
        hard_negatives=hard_negatives,
        metric=metric,
        select=select,  # type: ignore[arg-type]
        patience=patience or None,
        freeze_embeddings=freeze_embeddings,
        device=device,
        seed=seed,
        **{name: value for name, value in chosen.items() if value is not None},
    )
    if rank is not None and optimizer != "galore_adamw":
        raise InputError(f"--rank is GaLore's; {optimizer} has none")
    find_model(model)  # before a long read of documents
    dataset = read_judged(data)
    trained = train_encoder(
        model, dataset, config, out=out, resume=not fresh, ranks_every=ranks_every
    )
    console = Console()
    console.print(trained.table())
    console.print(trained.memory.table())
    best = trained.history.best
    kept = 0 if best is None else best.step
    console.print(
        f"{out}: weights of step {kept} (stopped by {trained.history.stopped}); "
        f"{trained.history.metric} on dev {trained.history.gain:+.4f}. It loads with "
        f"SentenceTransformer({str(out)!r})."
    )
    if select == "rankme":
        console.print(_selected(trained.history))


def _selected(history: Any) -> str:
    """What was chosen without labels, beside what the labels would have chosen, and its limits."""
    from dataclasses import replace

    chosen, oracle = history.best, replace(history, select="metric").best
    return (
        f"Chosen by RankMe: step {chosen.step} (RankMe {chosen.rankme:.1f}, {history.metric} "
        f"{chosen.metric:.4f}); by {history.metric} it would have been step {oracle.step} "
        f"({oracle.metric:.4f}). RankMe compares checkpoints of one run; a high one is necessary "
        "for good vectors, not sufficient: noise raises it while the metric falls, and weights "
        "that have hardly been trained may have a high one."
    )
