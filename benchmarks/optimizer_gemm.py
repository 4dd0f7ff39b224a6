"""What matrix products in bfloat16 do to the loss: ``gemm="bfloat16"`` beside float32.

    FULLRANK_DATA=... python benchmarks/optimizer_gemm.py

A Transformer over the bytes of tinyshakespeare, trained by each projected optimizer with the same
seeds, data and rates, once with products in float32 and once with factors rounded to bfloat16;
differences are within seeds. The time of a step is in benchmarks/optimizers_step.py.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from tiny_lm import TinyLM, bits_per_byte, data_folder, shakespeare, train

from fullrank.core import Table
from fullrank.optim import (
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    frugal_param_groups,
    param_groups,
)


def projected(kind, rank: int, gap: int):
    def make(model, gemm):
        groups = param_groups(model, kind, rank=rank, update_proj_gap=gap, verbose=False)
        return kind(groups, lr=0.01, refresh="subspace", gemm=gemm)

    return make


def frugal(subspace: str, gap: int):
    def make(model, gemm):
        groups = frugal_param_groups(model, subspace=subspace, update_gap=gap, gemm=gemm)
        return FrugalAdamW(groups, lr=1e-3)

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--gap", type=int, default=50)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if (folder := data_folder()) is None:
        sys.exit("set FULLRANK_DATA to the folder that holds tinyshakespeare.txt")
    data, test = shakespeare(folder)
    makers = {
        "GaLoreAdamW": projected(GaLoreAdamW, args.rank, args.gap),
        "FiraAdamW": projected(FiraAdamW, args.rank, args.gap),
        "GradNormLoRPAdamW": projected(GradNormLoRPAdamW, args.rank, args.gap),
        "FrugalAdamW svd": frugal("svd", args.gap),
        "FrugalAdamW random": frugal("random", args.gap),
    }
    rows = []
    for name, make in makers.items():
        found: dict[str | None, list[float]] = {None: [], "bfloat16": []}
        for gemm, losses in found.items():
            for seed in range(args.seeds):
                torch.manual_seed(seed)
                model = TinyLM(args.width, args.layers)
                train(model, make(model, gemm), data, args.steps, seed)
                losses.append(bits_per_byte(model, test))
        apart = [b - a for a, b in zip(*found.values(), strict=True)]
        spread = [statistics.stdev(v) if args.seeds > 1 else None for v in (found[None], apart)]
        means = [statistics.fmean(losses) for losses in found.values()]
        rows.append([name, means[0], spread[0], means[1], statistics.fmean(apart), spread[1]])
    columns = ["float32", "std over seeds", "bfloat16", "difference", "its std"]
    print(
        Table(
            ["optimizer", *columns],
            rows,
            title=f"bits per byte of tinyshakespeare; width {args.width}, {args.layers} layers, "
            f"rank {args.rank}, gap {args.gap}, {args.steps} steps of 16 x 64 bytes, "
            f"{args.seeds} seeds",
            formats=dict.fromkeys(columns, ".4f"),
        ).markdown()
    )


if __name__ == "__main__":
    main()
