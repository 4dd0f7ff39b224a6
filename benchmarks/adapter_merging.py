"""How much each task loses when the adapters of two are merged into one.

    python benchmarks/adapter_merging.py            # 3 seeds

An MLP 64-128-128-10 that knows scikit-learn's digits learns them turned by 90 degrees and, apart
from that, mirrored, by a LoRA of rank 4 on all three layers for each (150 steps of AdamW at
lr 1e-2). Both are merged with weights 0.5 and 1, without loss (rank 8) and to smaller ranks.
Test accuracy on either task, mean and spread (max - min) over the seeds; lost: largest share of
the norm of a layer's sum that the rank cut off.
"""

from __future__ import annotations

import argparse
import statistics

import numpy as np
import peft
import torch
from adapter_digits import RANK, STEPS, Data, accuracy, config, digits, learnt, train
from sklearn.datasets import load_digits

from fullrank.adapters.merging import merge_adapters
from fullrank.core import Table

LR = 1e-2
MERGES = [(weight, rank) for weight in (0.5, 1.0) for rank in (None, 4, 2)]


def mirrored() -> tuple[Data, Data]:
    """The same split as `digits`, left and right exchanged."""
    images, labels = load_digits(return_X_y=True)
    images = np.flip(images.reshape(-1, 8, 8), 2) / 16
    x = torch.tensor(images.reshape(-1, 64).copy(), dtype=torch.float32)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train_rows, test_rows = order[:1400], order[1400:]
    return (x[train_rows], y[train_rows]), (x[test_rows], y[test_rows])


def two_tasks(tasks: dict[str, tuple[Data, Data]], seed: int) -> peft.PeftModel:
    model = peft.get_peft_model(learnt(seed), config(), "turned")
    model.add_adapter("mirrored", config())
    for task, (data, _) in tasks.items():
        model.set_adapter(task)
        train(model, data, STEPS, LR, seed)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {"turned": digits(turned=True), "mirrored": mirrored()}
    scores: dict[str, list[list[float]]] = {}
    lost: dict[str, list[float]] = {}

    def note(way: str, model: torch.nn.Module, share: float = 0.0) -> None:
        scores.setdefault(way, []).append([accuracy(model, test) for _, test in tasks.values()])
        lost.setdefault(way, []).append(share)

    for seed in range(args.seeds):
        model = two_tasks(tasks, seed)
        with model.disable_adapter():
            note("base", model)
        for task in tasks:
            model.set_adapter(task)
            note(f"{task} alone", model)
        for weight, rank in MERGES:
            way = f"merged, weights {weight:g}, rank {rank or 2 * RANK}"
            report = merge_adapters(model, list(tasks), [weight] * 2, into="merged", rank=rank)
            model.set_adapter("merged")
            note(way, model, max(report.lost.values()))
            model.delete_adapter("merged")
    rows = []
    for way, runs in scores.items():
        cells = [
            f"{statistics.fmean(values):.3f} ({max(values) - min(values):.3f})"
            for values in zip(*runs, strict=True)
        ]
        rows.append([way, *cells, f"{statistics.fmean(lost[way]):.3f}"])
    title = f"Two tasks in one adapter, {args.seeds} seeds"
    print(Table(["way", *tasks, "lost"], rows, title).markdown())


if __name__ == "__main__":
    main()
