"""Maestro's claims in small: what ordered dropout finds, and the family of sizes it gives.

    python benchmarks/shrink_maestro.py --seeds 5

Recovery: a linear map to a 9 x 6 target of rank 3 from whitened inputs; importances against
singular values, and each prefix's error against the best matrix of that rank. Digits: a network of
64-64-64-10, started from the trained dense one's SVD or from random weights; its accuracy at each
prefix against the dense network truncated by SVD. Lasso: ranks that are left for growing weights.
"""

from __future__ import annotations

import argparse
import copy

import torch
from tiny_images import accuracy, digits, fit, mean_and_spread
from torch import nn

from fullrank.compress.maestro import Maestro
from fullrank.core import Table

PREFIXES = (64, 32, 16, 8, 4, 2)


def recovery(steps: int = 3000, lr: float = 0.5) -> Table:
    generator = torch.Generator().manual_seed(0)
    U = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    target = U @ torch.randn(3, 6, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9, bias=False)).double()
    maestro = Maestro(model, lam=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    x = torch.eye(6, dtype=torch.float64)
    for _ in range(steps):
        with maestro.sample():
            loss = (model(x) - target.T).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    layer = maestro.layers["0"]
    values = torch.linalg.svdvals(target)
    importance = layer.importance(hierarchical=False)
    rows = []
    for rank in range(1, 7):
        maestro.set_ranks({"0": rank})
        error = (maestro.layers["0"].merged_weight() - target).detach().norm()
        best = values[rank:].square().sum().sqrt()
        excess = float(error / best - 1) if rank < 3 else None
        rows.append([rank, float(values[rank - 1]), float(importance[rank - 1]), excess])
    return Table(
        ["component", "singular value", "importance", "prefix error above the best"],
        rows,
        title=f"A 9 x 6 target of rank 3, {steps} steps at learning rate {lr:g}",
        formats={"prefix error above the best": ".2%", "importance": ".3f"},
    )


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    linear = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    return nn.Sequential(*linear)


def sgd(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)


def conduct(maestro: Maestro, data, epochs: int, lr: float, seed: int) -> None:
    """Train, shrinking after each epoch."""
    optimizer = sgd(maestro.model, lr)
    for epoch in range(epochs):
        maestro.model.train()

        def loss(model, x, y):
            with maestro.sample():
                return nn.functional.cross_entropy(model(x), y) + maestro.penalty()

        fit(maestro.model, data, 1, optimizer, seed * 1000 + epoch, loss)
        maestro.shrink()


def at_ranks(maestro: Maestro, data, prefixes=PREFIXES) -> list[float]:
    scores = []
    for rank in prefixes:
        maestro.set_ranks({n: min(rank, layer.full_rank) for n, layer in maestro.layers.items()})
        scores.append(accuracy(maestro.model, data))
    maestro.set_ranks()
    return scores


def family(seeds: int, epochs: int, lam: float) -> Table:
    found: dict[str, list[list[float]]] = {}
    for seed in range(seeds):
        data = digits(seed).flat()
        dense = network(seed)
        fit(dense, data, 40, sgd(dense, 0.05), seed)
        found.setdefault("dense, then SVD", []).append(
            at_ranks(Maestro(copy.deepcopy(dense), lam=0.0), data)
        )
        starts = {"Maestro from the dense network": (dense, 0.01)}
        starts["Maestro from random weights"] = (network(seed), 0.02)
        for name, (start, lr) in starts.items():
            maestro = Maestro(copy.deepcopy(start), lam=lam)
            conduct(maestro, data, epochs, lr, seed)
            found.setdefault(name, []).append(at_ranks(maestro, data))
    rows = []
    for name, runs in found.items():
        rows.append([name, *(mean_and_spread(values) for values in zip(*runs, strict=True))])
    return Table(
        ["training", *(f"rank {rank}" for rank in PREFIXES)],
        rows,
        title=f"Accuracy on digits at each prefix; {epochs} epochs, lam {lam:g}, {seeds} seeds",
    )


def lasso(seeds: int, epochs: int, lams: list[float], eps: float) -> Table:
    rows = []
    for lam in lams:
        kept, scores = [], []
        for seed in range(seeds):
            data = digits(seed).flat()
            maestro = Maestro(network(seed), lam=lam, eps=eps)
            conduct(maestro, data, epochs, 0.02, seed)
            kept.append(float(sum(layer.full_rank for layer in maestro.layers.values())))
            scores.append(accuracy(maestro.model, data))
        rows.append([f"{lam:g}", mean_and_spread(kept, ".1f"), mean_and_spread(scores)])
    return Table(
        ["lam", "ranks left of 138", "accuracy"],
        rows,
        title=f"Weight of the lasso; eps {eps:g}, {epochs} epochs, {seeds} seeds",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--lam", type=float, default=3e-5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["recovery", "digits", "lasso"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only in (None, "recovery"):
        print(recovery().markdown(), end="\n\n")
    if args.only in (None, "digits"):
        print(family(args.seeds, args.epochs, args.lam).markdown(), end="\n\n")
    if args.only in (None, "lasso"):
        lams = [0.0, 1e-4, 3e-4, 1e-3, 3e-3]
        print(lasso(min(args.seeds, 3), 20, lams, 0.1).markdown(), end="\n\n")


if __name__ == "__main__":
    main()
