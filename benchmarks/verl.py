"""VERL against plain GRPO: a small language model on synthetic arithmetic, several seeds.

    python benchmarks/verl.py --seeds 3

A two-layer Qwen2 of width 64 over bytes learns sums of three numbers with their working from
solutions, stopped early, then from rewards alone: the same start, problems and settings with
VERL's shaping and without. Printed are rewards, pass@1 and pass@8 on problems not trained on, the
share of responses with a bonus, and over sampled responses the correlations of effective rank,
its velocity and length.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from fullrank.core import Table
from fullrank.spectra import rank_dynamics, read_run
from fullrank.training.lm_data import byte_tokenizer
from fullrank.training.rl import TrainedPolicy, train_rl
from fullrank.training.rl_config import RLRun
from fullrank.training.rl_problems import sums

STRIDE = 4
TOKENS = 40
MODEL = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}


def settings(model: dict[str, Any], method: str, steps: int, lr: float, seed: int) -> RLRun:
    options = {
        "learning_rate": lr,
        "per_device_train_batch_size": 128,
        "num_generations": 8,
        "max_completion_length": TOKENS,
    }
    if method == "verl":
        options["rank_stride"] = STRIDE
    return RLRun.of(
        {
            "model": model,
            "data": {"dev_problems": 200},
            "trainer": {"method": method, "options": options},
            "loop": {"steps": steps, "save_every": steps, "seed": seed, "device": "cpu"},
        }
    )


def correlations(folder: Path, seed: int) -> tuple[float, float, float]:
    """Of ER with ERV, of ER with length, and of ER with ERV at equal length; 200 responses."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    prompts = [row["prompt"] for row in sums(200, seed + 1000)]
    inputs = tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    torch.manual_seed(seed)
    with torch.no_grad():
        ids = model.generate(**inputs, max_new_tokens=TOKENS, do_sample=True, top_k=0)
        start = inputs["input_ids"].shape[1]
        ended = (ids[:, start:] == tokenizer.eos_token_id).long().cumsum(1)
        mask = ended == 0
        mask |= (ended == 1) & (ids[:, start:] == tokenizer.eos_token_id)
        seen = torch.cat([inputs["attention_mask"], mask.long()], 1)
        states = model.model(input_ids=ids, attention_mask=seen).last_hidden_state
    found = rank_dynamics(states[:, start - 1 : -1], mask, STRIDE)
    er, erv, length = found.er.numpy(), found.erv.numpy(), mask.sum(1).numpy()
    table = np.corrcoef([er, erv, length])
    a, b, c = table[0, 1], table[0, 2], table[1, 2]
    partial = (a - b * c) / np.sqrt((1 - b**2) * (1 - c**2))
    return float(a), float(b), float(partial)


def row(seed: int, method: str, trained: TrainedPolicy, seconds: float) -> list[Any]:
    part = max(1, len(trained.rewards) // 5)
    log = read_run(trained.folder).measures
    shares = [
        statistics.fmean(log[name].values()) if name in log else None
        for name in ("rank/rewarded", "rank/saturated")
    ]
    first, last = trained.rewards[:part], trained.rewards[-part:]
    after = trained.after
    rewards = [statistics.fmean(first), statistics.fmean(last)]
    return [seed, method, *rewards, after.greedy, after.mean, after.best, *shares, seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--warmup", type=int, default=800)
    chosen = parser.parse_args()
    rows, related = [], []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(chosen.seeds):
            start = {"config": MODEL, "warmup_steps": chosen.warmup}
            for method in ("grpo", "verl"):
                folder = Path(temporary) / f"{method}-{seed}"
                began = time.perf_counter()
                trained = train_rl(settings(start, method, chosen.steps, chosen.lr, seed), folder)
                rows.append(row(seed, method, trained, time.perf_counter() - began))
                if method == "grpo":
                    before = trained.before
                    solved = [before.greedy, before.mean, before.best]
                    empty = [None, None]
                    rows.insert(-1, [seed, "start", *empty, *solved, *empty, None])
                    start = {"name": str(folder / "start")}
                    related.append([seed, *correlations(folder / "start", seed)])
            print(f"seed {seed}: done", flush=True)
    columns = ["seed", "method", "first reward", "last reward", "pass@1 greedy", "pass@1", "pass@8"]
    columns += ["with bonus", "saturated", "s"]
    formats = dict.fromkeys(columns[2:9], ".3f") | {"s": ".0f"}
    title = (
        f"{chosen.steps} steps of 16 problems x 8 responses; rewards of the first and last fifth"
    )
    print(Table(columns, rows, title=title, formats=formats).markdown(), "\n")
    gaps = [rows[i + 1][3] - rows[i][3] for i in range(len(rows) - 1) if rows[i + 1][1] == "verl"]
    spread = statistics.stdev(gaps) / len(gaps) ** 0.5 if len(gaps) > 1 else float("nan")
    print(f"last reward, VERL - GRPO: {statistics.fmean(gaps):+.3f}, standard error {spread:.3f}\n")
    names = ["seed", "ER, ERV", "ER, length", "ER, ERV at equal length"]
    title = "Correlations over 200 responses of the start"
    print(Table(names, related, title=title, formats=dict.fromkeys(names[1:], ".2f")).markdown())


if __name__ == "__main__":
    main()
