"""`fullrank train rl`: a language model trained from rewards, from a file of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console

from fullrank.cli.train_options import (
    changes,
    folder,
    out_folder,
    read_run,
    settings,
    shows,
)

EXAMPLE = """\
# fullrank train rl run.yaml --out run
model:
  # A new model, taught the built-in problems first; or  name: FOLDER-OR-HUGGING-FACE-NAME
  config:
    model_type: qwen2
    hidden_size: 64
    intermediate_size: 160
    num_hidden_layers: 2
    num_attention_heads: 4
    num_key_value_heads: 4
    max_position_embeddings: 128
  warmup_steps: 1000
data:
  source: arithmetic      # or a JSONL file with prompt and what the rewards take
  problems: 2000
  dev_problems: 100
reward:
  functions: [arithmetic] # or module:function, e.g. my_rewards:brevity
trainer:
  method: verl            # or grpo, verl_rloo, rloo
  options:                # any setting of TRL's trainer, and VERL's
    learning_rate: 0.0001
    per_device_train_batch_size: 128
    num_generations: 8
    max_completion_length: 40
    rank_stride: 4
loop:
  steps: 100
  save_every: 50
  ranks_every: 25         # effective ranks for  fullrank see run run --watch
  seed: 0
"""


def rl(
    config: Annotated[Path, settings("model", "data", "reward", "trainer", "loop")],
    overrides: Annotated[
        list[str] | None,
        changes("trainer.method=grpo loop.steps=200"),
    ] = None,
    out: Annotated[Path | None, folder("the run")] = None,
    example: Annotated[bool, shows("--example", "a file to start from", lambda: EXAMPLE)] = False,
) -> None:
    """Train a language model from rewards: GRPO or RLOO, with VERL's shaping or without.

    Measures dev problems before and after. Watch it with `fullrank see run DIR --watch`; start
    from `fullrank train rl --example`.
    """
    from fullrank.training.rl import train_rl
    from fullrank.training.rl_config import RLRun

    run = read_run(RLRun, config, overrides)
    out = out_folder(out, config)
    trained = train_rl(run, out)
    console = Console()
    console.print(trained.table())
    rewards = trained.rewards
    part = max(1, len(rewards) // 10)
    console.print(
        f"{out}: mean training reward {sum(rewards[:part]) / part:.3f} in the first {part} steps, "
        f"{sum(rewards[-part:]) / part:.3f} in the last. It loads with "
        f"AutoModelForCausalLM.from_pretrained({str(out)!r})."
    )
