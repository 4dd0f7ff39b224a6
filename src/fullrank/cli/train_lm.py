"""`fullrank train lm`: pre-train or fine-tune a language model from a file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console

from fullrank.cli.train_options import (
    Fresh,
    Optimizers,
    RanksEvery,
    changes,
    folder,
    out_folder,
    read_run,
    settings,
    shows,
)

EXAMPLE = """\
# fullrank train lm run.yaml --out run
model:
  # A new model; or, to go on from one:  name: FOLDER-OR-HUGGING-FACE-NAME
  config:
    model_type: llama
    hidden_size: 96
    intermediate_size: 256
    num_hidden_layers: 2
    num_attention_heads: 4
    max_position_embeddings: 128
data:
  source: python_source   # or tinyshakespeare, a text or JSONL file, a folder, hf:NAME
  tokenizer: bytes        # or a folder or Hugging Face name
  context: 128
optimizer:
  name: galore_adamw      # fullrank train lm --optimizers lists them
  lr: 0.01                # weight matrices inside the blocks
  head_lr: 0.003          # embeddings, head, norms
  rank: 24
  options: {scale: 1.0, refresh: subspace}
loop:
  steps: 1000
  batch_size: 16
  evaluations: 10
  seed: 0
"""


def lm(
    config: Annotated[Path, settings("model", "data", "optimizer", "loop")],
    overrides: Annotated[
        list[str] | None,
        changes("optimizer.name=fira_adamw loop.steps=200"),
    ] = None,
    out: Annotated[Path | None, folder("the model")] = None,
    fresh: Fresh = False,
    ranks_every: RanksEvery = 0,
    example: Annotated[bool, shows("--example", "a file to start from", lambda: EXAMPLE)] = False,
    optimizers: Optimizers = False,
) -> None:
    """Pre-train or fine-tune a causal language model with any optimizer.

    Measures bits per byte on the dev part, keeps the best weights, and writes a model that
    transformers loads, a log (JSONL, CSV) and a plot. Start from `fullrank train lm --example`.
    """
    from fullrank.training import LMTraining, train_lm

    run = read_run(LMTraining, config, overrides)
    out = out_folder(out, config)
    trained = train_lm(run, out=out, resume=not fresh, ranks_every=ranks_every)
    console = Console()
    console.print(trained.history.table())
    console.print(trained.memory.table())
    best = trained.history.best
    assert best is not None
    console.print(
        f"{out}: weights of step {best.step}, {best.metric:.4f} bits per byte on dev (stopped by "
        f"{trained.history.stopped}, {trained.history.tokens_per_second:,.0f} tokens/s). It loads "
        f"with AutoModelForCausalLM.from_pretrained({str(out)!r})."
    )
