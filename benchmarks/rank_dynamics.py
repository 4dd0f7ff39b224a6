"""Rank dynamics of hidden states against VERL's way of computing them: times and numbers.

    python benchmarks/rank_dynamics.py --threads 1

32 responses of 512 tokens and width 896 (half a billion parameters), stride 40, in three kinds:
states that do not depend on each other, states that remember the one before (AR(1), 0.9), and
those with features whose scales fall from 1 to 0.01. Compared, in turns, are `rank_dynamics` and
two restatements of what the official code does to each response in float32: an SVD of all tokens
and, for every prefix, either the eigenvalues of its Gram matrix, grown with the prefix and centred
by its sums (what the code does by default), or an SVD of its own (what it keeps as the baseline).
Numbers are compared with those of an SVD of every prefix in float64.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fullrank.core import Table
from fullrank.spectra import rank_dynamics

EPS = 1e-8
KINDS = ("independent", "remembering", "falling scales")


def states(kind: str, responses: int, tokens: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(responses, tokens, width, generator=generator)
    if kind == "independent":
        return steps
    found = [steps[:, 0]]
    for t in range(1, tokens):
        found.append(0.9 * found[-1] + (1 - 0.9**2) ** 0.5 * steps[:, t])
    scales = torch.logspace(0, -2, width) if kind == "falling scales" else 1.0
    return torch.stack(found, 1) * scales


def from_singular_values(sigma: Tensor) -> float:
    p = sigma / (sigma.sum() + EPS)
    return float((-(p * (p + EPS).log()).sum()).exp())


def by_svd(rows: Tensor) -> float:
    return from_singular_values(torch.linalg.svdvals(rows - rows.mean(0)))


def prefixes_by_svd(rows: Tensor, stride: int) -> list[float]:
    return [by_svd(rows[: end + 1]) for end in range(stride, len(rows), stride)]


def prefixes_by_gram(rows: Tensor, stride: int) -> list[float]:
    ranks, gram, total, done = [], rows[:0] @ rows[:0].T, torch.zeros_like(rows[0]), 0
    for end in range(stride, len(rows), stride):
        old, new = rows[:done], rows[done : end + 1]
        corner = old @ new.T
        gram = torch.cat([torch.cat([gram, corner], 1), torch.cat([corner.T, new @ new.T], 1)], 0)
        total, done = total + new.sum(0), end + 1
        mean = total / done
        along = rows[:done] @ mean
        centred = gram - along[:, None] - along + mean @ mean
        ranks.append(from_singular_values(torch.linalg.eigvalsh(centred).relu().sqrt()))
    return ranks


def one_by_one(
    hidden: Tensor, stride: int, prefixes: Callable[[Tensor, int], list[float]]
) -> Tensor:
    """Effective rank, velocity and acceleration of each response, ``(B, 3)``."""
    rows = []
    for response in hidden:
        series = prefixes(response, stride)
        change = [r - statistics.fmean(series[:j]) for j, r in enumerate(series) if j]
        turns = [b - a for a, b in itertools.pairwise(change)]
        rows.append([by_svd(response), statistics.fmean(change), statistics.fmean(turns)])
    return torch.tensor(rows, dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--responses", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--stride", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ways: dict[str, Callable[[Tensor], Tensor]] = {
        "rank_dynamics": lambda hidden: torch.stack(rank_dynamics(hidden, stride=args.stride), 1),
        "official, grown Gram matrix": lambda hidden: one_by_one(
            hidden, args.stride, prefixes_by_gram
        ),
        "official, SVD of each prefix": lambda hidden: one_by_one(
            hidden, args.stride, prefixes_by_svd
        ),
    }
    rows = []
    for kind in KINDS:
        hidden = states(kind, args.responses, args.tokens, args.width)
        exact = one_by_one(hidden[:4].double(), args.stride, prefixes_by_svd)
        wall: dict[str, list[float]] = {way: [] for way in ways}
        cpu: dict[str, list[float]] = {way: [] for way in ways}
        off: dict[str, Tensor] = {}
        for _ in range(args.rounds):
            for way, work in ways.items():
                began = time.perf_counter(), time.process_time()
                found = work(hidden)
                wall[way].append(time.perf_counter() - began[0])
                cpu[way].append(time.process_time() - began[1])
                off[way] = ((found[:4] - exact) / exact).abs().amax(0)
        own_wall, own_cpu = (statistics.median(t["rank_dynamics"]) for t in (wall, cpu))
        for way in ways:
            took, spent = statistics.median(wall[way]), statistics.median(cpu[way])
            rows.append(
                [
                    kind,
                    way,
                    f"{took:.2f}",
                    f"{took / own_wall:.1f}",
                    f"{spent / own_cpu:.1f}",
                    *(f"{error:.0e}" for error in off[way].tolist()),
                ]
            )
    columns = ["states", "way", "s", "times ours", "times ours, CPU"]
    title = (
        f"{args.responses} responses of {args.tokens} tokens, width {args.width}, "
        f"{args.threads} thread(s), median of {args.rounds}; relative errors"
    )
    print(Table([*columns, "ER off", "ERV off", "ERA off"], rows, title).markdown())


if __name__ == "__main__":
    main()
