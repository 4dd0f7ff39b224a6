"""Rank dynamics of hidden states against a fresh SVD of every prefix: CPU time, one thread.

    python benchmarks/rank_dynamics.py

The ways take turns. 32 responses of 512 tokens and width 896 (AR(1) along the tokens, so that
ranks grow as those of language models do), stride 40. The other way is the definition, one
response and one prefix at a time: centre, decompose, take the entropy; in float32 with singular
vectors, as the official code decomposes, and without.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time

import torch

from fullrank.core import Table
from fullrank.spectra import rank_dynamics

EPS = 1e-8


def states(count: int, tokens: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(count, tokens, width, generator=generator)
    found = [steps[:, 0]]
    for t in range(1, tokens):
        found.append(0.9 * found[-1] + 0.44 * steps[:, t])
    scales = torch.logspace(0, -2, width)
    return torch.stack(found, 1) * scales


def effective_rank(rows: torch.Tensor, vectors: bool) -> float:
    centred = rows - rows.mean(0)
    if vectors:
        sigma = torch.linalg.svd(centred, full_matrices=False).S
    else:
        sigma = torch.linalg.svdvals(centred)
    p = sigma / (sigma.sum() + EPS)
    return float(torch.exp(-(p * (p + EPS).log()).sum()))


def one_by_one(
    hidden: torch.Tensor, stride: int, vectors: bool
) -> list[tuple[float, float, float]]:
    found = []
    for rows in hidden:
        series = [
            effective_rank(rows[: end + 1], vectors) for end in range(stride, len(rows), stride)
        ]
        changes = [r - statistics.fmean(series[:j]) for j, r in enumerate(series) if j]
        turns = [b - a for a, b in itertools.pairwise(changes)]
        whole = effective_rank(rows, vectors)
        found.append((whole, statistics.fmean(changes), statistics.fmean(turns)))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--responses", type=int, default=32)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hidden = states(args.responses, 512, 896)
    ways = {
        "each prefix decomposed, with vectors": lambda: one_by_one(hidden, 40, vectors=True),
        "each prefix decomposed": lambda: one_by_one(hidden, 40, vectors=False),
        "rank_dynamics (float64)": lambda: rank_dynamics(hidden, stride=40),
    }
    spent: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(args.rounds):
        for name, work in ways.items():
            began = time.process_time()
            results[name] = work()
            spent[name].append(time.process_time() - began)
    own = statistics.median(spent["rank_dynamics (float64)"])
    rows = [[name, statistics.median(s), statistics.median(s) / own] for name, s in spent.items()]
    formats = {"s": ".2f", "times ours": ".1f"}
    print(Table(["way", "s", "times ours"], rows, formats=formats).markdown())
    ours = torch.stack(list(results["rank_dynamics (float64)"]), 1)
    other = torch.tensor(results["each prefix decomposed"], dtype=torch.float64)
    print(f"\nlargest relative difference: {float(((ours - other) / other).abs().max()):.1e}")


if __name__ == "__main__":
    main()
