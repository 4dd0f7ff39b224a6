"""A training step of FlyLoRA and of Hydra against LoRA of PEFT with as many trained numbers.

    python benchmarks/flylora_hydra_speed.py

Three linear layers 384-384-1536-384 with GELU between them, 1024 rows that ask for a gradient, one
thread. A step is a forward and a backward pass; ways take turns, the median of their CPU times is
shown. FlyLoRA (r 32, k 8) counts its experts as in training; it trains r * out numbers a layer,
which is LoRA's r 16 in this stack.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import nn

from fullrank.adapters import adapt
from fullrank.core import Table

LAYERS = ("0", "2", "4")


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384)]
    return nn.Sequential(*layers).requires_grad_(False)


def adapted(method: str, rank: int, **options) -> nn.Module:
    model = adapt(stack(), method, rank=rank, targets=list(LAYERS), progress=False, **options)
    return model.train()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = {"LoRA r 16": adapted("lora", 16), "FlyLoRA r 32, k 8": adapted("flylora", 32, k=8)}
    pairs |= {"LoRA r 8": adapted("lora", 8), "Hydra 4 + 4": adapted("hydra", 8)}
    x = torch.randn(1024, 384, requires_grad=True)
    times: dict[str, list[float]] = {way: [] for way in pairs}
    for repeat in range(args.repeats + 3):
        for way, model in pairs.items():
            began = time.process_time()
            model(x).square().mean().backward()
            if repeat >= 3:
                times[way].append(1e3 * (time.process_time() - began))
    rows, reference = [], 0.0
    for way, model in pairs.items():
        median = statistics.median(times[way])
        reference = median if way.startswith("LoRA") else reference
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append([way, trained, f"{median:.1f}", f"{median / reference:.2f}"])
    title = f"Forward and backward, CPU time, median of {args.repeats}"
    print(Table(["way", "trained", "ms", "of LoRA's"], rows, title).markdown())


if __name__ == "__main__":
    main()
