"""`fullrank train finetune`: a language model, classifier or encoder, from a file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console

from fullrank.cli.train_options import (
    PLACEHOLDER,
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

EXAMPLE = f"""\
# fullrank train finetune run.yaml --out tuned
model:
  kind: lm                # or classifier, encoder
  name: {PLACEHOLDER}
data:
  # lm: a text or JSONL file (text, or prompt and completion), a folder, python_source, gsm8k
  # classifier: JSONL with text and label;  encoder: pydocs, cranfield, a BEIR folder
  source: notes.jsonl
  max_tokens: 128
adapter:
  method: eva             # fullrank train finetune --adapters lists them; full: none
  rank: 8
  as_lora: false          # true: saved as an ordinary LoRA, which loads without fullrank
  options: {{rho: 2.0}}
optimizer:
  name: adamw             # fullrank train finetune --optimizers lists them
  lr: 0.001
loop:
  steps: 500
  batch_size: 16
  evaluations: 10
  patience: 3             # stop after so many evaluations without a new best
  seed: 0
"""


def _adapters() -> str:
    from fullrank.adapters.adapt_methods import METHODS

    needs = {
        n: "" if m.needs == "nothing" else f" (starts from {m.needs})" for n, m in METHODS.items()
    }
    lines = [f"{name:14}{method.title}{needs[name]}" for name, method in METHODS.items()]
    return "\n".join([*lines, f"{'full':14}no adapter: every weight is trained"])


def finetune(
    config: Annotated[Path, settings("model", "data", "adapter", "optimizer", "loop")],
    overrides: Annotated[
        list[str] | None,
        changes("adapter.method=lora_ga loop.steps=200"),
    ] = None,
    out: Annotated[Path | None, folder("the adapter")] = None,
    fresh: Fresh = False,
    ranks_every: RanksEvery = 0,
    example: Annotated[bool, shows("--example", "a file to start from", lambda: EXAMPLE)] = False,
    adapters: Annotated[bool, shows("--adapters", "the adapters' names", _adapters)] = False,
    optimizers: Optimizers = False,
) -> None:
    """Fine-tune a language model, a classifier or an encoder with any adapter and optimizer.

    Measures the dev part, keeps the best weights, and writes the adapter in PEFT's format, a log
    (JSONL, CSV) and a plot. Start from `fullrank train finetune --example`.
    """
    from fullrank.training.finetune import finetune as tune
    from fullrank.training.finetune_config import FULL, FinetuneRun

    run = read_run(FinetuneRun, config, overrides)
    out = out_folder(out, config)
    tuned = tune(run, out=out, resume=not fresh, ranks_every=ranks_every)
    console = Console()
    console.print(tuned.history.table())
    console.print(tuned.memory.table())
    best = tuned.history.best
    assert best is not None
    trained, whole = tuned.data["trained_parameters"], tuned.data["parameters"]
    what = "the model" if run.adapter.method == FULL else f"the {run.adapter.method} adapter"
    console.print(
        f"{out}: {what} of step {best.step}, dev {tuned.history.metric} {best.metric:.4f} "
        f"({tuned.history.gain:+.4f}; stopped by {tuned.history.stopped}); {trained:,} of "
        f"{whole:,} numbers trained."
    )
    if run.adapter.method != FULL:
        from fullrank.adapters.loading import how_to_load

        console.print(
            f"It loads with {how_to_load(out)}; see it with fullrank adapters inspect {out}"
        )
