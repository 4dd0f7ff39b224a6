"""Greenformers' claims in small: which solver keeps a trained network, and training by design.

    python benchmarks/greenformers.py --seeds 3

A network 64-96-96-10 on scikit-learn's digits, its layers factorised at a share of their break-even
ranks. After training: accuracy of the factorised network as it is, and after a few epochs more
(the same for all; from ``random`` that is training the factorised network from scratch). By design:
the factorised network from scratch for the dense one's number of epochs, and for three times that.
"""

from __future__ import annotations

import argparse

import torch
from tiny_images import Images, accuracy, digits, fit, mean_and_spread
from torch import nn

from fullrank.compress import greenformers
from fullrank.core import Table

SOLVERS = ("svd", "snmf", "random")


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 96),
        nn.ReLU(),
        nn.Linear(96, 96),
        nn.ReLU(),
        nn.Linear(96, 10),
    )


def trained(model: nn.Module, data: Images, epochs: int, seed: int, lr: float) -> nn.Module:
    return fit(model, data, epochs, torch.optim.Adam(model.parameters(), lr=lr), seed)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.75, 0.5, 0.25])
    parser.add_argument("--epochs", type=int, default=10, help="of the dense network")
    parser.add_argument("--more", type=int, default=5, help="epochs after factorisation")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seeds = range(options.seeds)
    data = {seed: digits(seed) for seed in seeds}
    dense = {s: trained(network(s), data[s], options.epochs, s, options.lr) for s in seeds}
    base = [accuracy(dense[s], data[s]) for s in seeds]
    rows = [["dense", 1.0, parameters(dense[0]), mean_and_spread(base), "", "", ""]]
    for share in options.shares:
        for solver in SOLVERS:
            before, after, design, longer = [], [], [], []
            for s in seeds:
                torch.manual_seed(1000 + s)
                small = greenformers(dense[s], share, solver)
                before.append(accuracy(small, data[s]))
                after.append(
                    accuracy(trained(small, data[s], options.more, s, options.lr), data[s])
                )
                if solver == "random":
                    for epochs, found in ((1, design), (3, longer)):
                        new = greenformers(network(s), share, "random")
                        trained(new, data[s], epochs * options.epochs, s, options.lr)
                        found.append(accuracy(new, data[s]))
            cells = [mean_and_spread(values) if values else "" for values in (design, longer)]
            rows.append(
                [
                    solver,
                    share,
                    parameters(small),
                    mean_and_spread(before),
                    mean_and_spread(after),
                    *cells,
                ]
            )
    columns = [
        "solver",
        "share",
        "parameters",
        "as it is",
        f"{options.more} epochs more",
        f"by design, {options.epochs} epochs",
        f"by design, {3 * options.epochs} epochs",
    ]
    title = f"Digits, MLP 64-96-96-10, accuracy over {options.seeds} seeds"
    print(Table(columns, rows, title=title, formats={"parameters": ",d"}).markdown())


if __name__ == "__main__":
    main()
