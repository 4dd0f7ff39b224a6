"""LoRA-SB beside LoRA-XS and LoRA, on digits turned by 90 degrees.

    python benchmarks/lora_sb.py            # 3 seeds, six learning rates, about a minute on a core

An MLP 64-128-128-10 that knows scikit-learn's digits learns them turned, in 150 steps of AdamW at
a constant rate. LoRA-XS and LoRA-SB train a core of 8 x 8 numbers in each of the three layers;
LoRA-SB starts from the gradients of 50 of the training rows, once for each rate of the first step.
Each way at its best learning rate (lowest mean final loss over the seeds). First: the training loss
before any step; final: mean of the last 20 steps.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import adapter_digits as digits
import peft
import torch
from torch import nn

from fullrank.adapters import lora_sb
from fullrank.core import Table

RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
CORE, SAMPLES = 8, 50
Make = Callable[[nn.Module, digits.Data, int], Any]


def config(init: str, seed: int) -> lora_sb.LoraSBConfig:
    # The last layer has 10 rows, which 8 does not exceed.
    return lora_sb.LoraSBConfig(r=CORE, target_modules=["a", "b", "c"], init=init, seed=seed)


def by_weight(base: nn.Module, data: digits.Data, seed: int) -> Any:
    return peft.get_peft_model(base, config("xs", seed))


def by_update(rate: float) -> Make:
    def make(base: nn.Module, data: digits.Data, seed: int) -> Any:
        model = peft.get_peft_model(base, config("update", seed))
        batches = digits.chunks(data, seed, count=1)
        lora_sb.initialize(model, batches, rate, SAMPLES, loss_fn=digits.loss_fn, progress=False)
        return model

    return make


WAYS: dict[str, Make] = {
    "LoRA, r 4": digits.plain,
    "LoRA-XS": by_weight,
    **{f"LoRA-SB, first step {rate:g}": by_update(rate) for rate in (1e-3, 3e-3, 1e-2)},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, test = digits.digits(turned=True)
    bases = [digits.learnt(seed) for seed in range(args.seeds)]
    rows = []
    for way, make in WAYS.items():
        tried = []
        for lr in RATES:
            runs = []
            for seed, base in enumerate(bases):
                model = make(copy.deepcopy(base), data, seed)
                with torch.no_grad():
                    first = digits.loss_fn(model, data).item()
                losses = digits.train(model, data, digits.STEPS, lr, seed)
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                final = statistics.fmean(losses[-20:])
                runs.append((final, first, digits.accuracy(model, test), trained))
            tried.append((statistics.fmean(run[0] for run in runs), lr, runs))
        _, lr, runs = min(tried)
        final, first, right, trained = zip(*runs, strict=True)
        each = [" / ".join(f"{v:.3f}" for v in values) for values in (first, final, right)]
        rows.append([way, trained[0], f"{lr:g}", *each])
    columns = ["way", "trained", "lr", "first loss", "final loss", "test accuracy"]
    print(Table(columns, rows, f"Turned digits, {args.seeds} seeds").markdown())


if __name__ == "__main__":
    main()
