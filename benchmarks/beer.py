"""BEER on a critic whose features have collapsed: does it spread them, and no further?

    python benchmarks/beer.py               # the paper's bound
    python benchmarks/beer.py --official    # what the official code computes

A critic 8-32-32-1 whose hidden weights are squeezed towards rank 1 learns from 512 fixed random
transitions, with the regulariser at several weights, in 300 updates of 128 rows; three seeds. The
share of rows that violate the bound, by how much, and the squared error are means over the last
30 updates; ranks are of the features of all transitions at the end (of 32).
"""

from __future__ import annotations

import argparse
import copy
import statistics

import torch
from torch import nn

from fullrank.core import Table
from fullrank.rl import BEERRegularizer
from fullrank.spectra import feature_rank

BETAS = (0.0, 1e-3, 1e-2, 0.1, 1.0)
GAMMA, ROWS, BATCH, LAST = 0.99, 512, 128, 30


class Critic(nn.Module):
    def __init__(self, inputs: int = 8, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 1)


def collapsed(seed: int) -> Critic:
    torch.manual_seed(seed)
    critic = Critic()
    with torch.no_grad():
        for layer in (critic.body[0], critic.body[2]):
            u, s, vh = torch.linalg.svd(layer.weight, full_matrices=False)
            s[1:] *= 0.05
            layer.weight.copy_((u * s) @ vh)
            layer.bias.add_(0.3)
    return critic


def run(beta: float, seed: int, updates: int, official: bool) -> dict[str, float]:
    critic = collapsed(seed)
    target = copy.deepcopy(critic)
    generator = torch.Generator().manual_seed(100 + seed)
    state = torch.randn(ROWS, 8, generator=generator)
    following = state + 0.1 * torch.randn(ROWS, 8, generator=generator)
    reward = torch.randn(ROWS, generator=generator)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-4)
    beer = BEERRegularizer(beta=beta, gamma=GAMMA, official=official)
    found: dict[str, list[float]] = {"violating": [], "violation": [], "error": []}
    for _ in range(updates):
        rows = torch.randint(ROWS, (BATCH,), generator=generator)
        here = critic.body(state[rows])
        with torch.no_grad():
            there = target.body(following[rows])
            wanted = reward[rows] + GAMMA * target.head(there)[:, 0]
            online = critic.body(following[rows])
        error = nn.functional.mse_loss(critic.head(here)[:, 0], wanted)
        head = critic.head
        term = beer(here, there, reward[rows], head.weight, None, head.bias, online)
        optimizer.zero_grad()
        (error + term).backward()
        optimizer.step()
        with torch.no_grad():
            for p, q in zip(critic.parameters(), target.parameters(), strict=True):
                q.lerp_(p, 0.005)
        found["error"].append(error.item())
        for name in ("violating", "violation"):
            found[name].append(beer.last_stats[name].item())
    with torch.no_grad():
        features = critic.body(state)
    means = {name: statistics.fmean(values[-LAST:]) for name, values in found.items()}
    return {
        **means,
        "numerical": feature_rank(features),
        "effective": feature_rank(features, kind="effective"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--official", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for beta in BETAS:
        runs = [run(beta, seed, args.updates, args.official) for seed in range(args.seeds)]

        def each(name: str, spec: str, runs: list = runs) -> str:
            return " / ".join(format(r[name], spec) for r in runs)

        rows.append(
            [
                f"{beta:g}",
                each("violating", ".2f"),
                each("violation", ".3f"),
                each("numerical", ".0f"),
                each("effective", ".1f"),
                each("error", ".3f"),
            ]
        )
    columns = ["beta", "share violating", "mean violation", "numerical rank", "effective rank"]
    title = f"A collapsed critic, {args.updates} updates, seeds 0 to {args.seeds - 1}"
    print(Table([*columns, "squared error"], rows, title).markdown())


if __name__ == "__main__":
    main()
