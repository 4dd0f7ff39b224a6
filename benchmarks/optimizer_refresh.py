"""How much of a gradient's energy the cheap refresh keeps, on gradients of a language model.

    FULLRANK_DATA=... python benchmarks/optimizer_refresh.py

A Transformer over the bytes of tinyshakespeare is trained by GaLoreAdamW with
``refresh="subspace"``, for several gaps between refreshes. At every refresh of every matrix the
energy that its basis captures of the gradient is compared with what the exact singular vectors
would capture. Bases are found by power iteration from the old ones, or, where that would keep less
than 99.9 %, by a decomposition: the table says how often, and after how many power steps. CPU time
is that of all refreshes, beside the same ones by SVD.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from tiny_lm import TinyLM, batch, data_folder, loss_of, shakespeare

from fullrank.core import Table
from fullrank.optim import GaLoreAdamW, IterativeSubspace, SVDSubspace, param_groups


@dataclass
class Watch:
    """A projection hook that fits as the optimizer would, measures, and lets it go its way."""

    rank: int
    energies: list[float] = field(default_factory=list)
    steps: Counter = field(default_factory=Counter)
    spent: dict[str, float] = field(default_factory=lambda: {"subspace": 0.0, "svd": 0.0})
    old: dict[int, IterativeSubspace] = field(default_factory=dict)

    def __call__(self, weight, grad, side):
        key = weight.data_ptr()
        old = self.old.get(key, IterativeSubspace(self.rank, side))
        new = self._timed("subspace", lambda: old.fit(weight, grad))
        exact = self._timed("svd", lambda: SVDSubspace(self.rank, side).fit(weight, grad))
        if old.fitted:  # the first is the SVD itself
            kept, most = (s.down(grad).double().square().sum().item() for s in (new, exact))
            self.energies.append(kept / most)
            self.steps[new.steps] += 1
        else:
            self.spent = {"subspace": 0.0, "svd": 0.0}
        new.align(old)
        self.old[key] = new
        bases = tuple(new.state.values())
        return bases if side == "full" else bases[0]

    def _timed(self, name, work):
        began = time.process_time()
        found = work()
        self.spent[name] += time.process_time() - began
        return found


def run(data, args, gap: int, proj_type: str, seed: int) -> Watch:
    torch.manual_seed(seed)
    model = TinyLM(args.width, args.layers)
    watch = Watch(args.rank)
    groups = param_groups(
        model, rank=args.rank, update_proj_gap=gap, proj_type=proj_type, verbose=False
    )
    optimizer = GaLoreAdamW(groups, lr=args.lr, projection_hook=watch)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(args.steps):
        optimizer.zero_grad()
        loss_of(model, batch(data, args.batch, generator)).backward()
        optimizer.step()
    return watch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=401)
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--gaps", type=int, nargs="+", default=[1, 10, 50, 200])
    parser.add_argument("--seeds", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if (folder := data_folder()) is None:
        sys.exit("set FULLRANK_DATA to the folder that holds tinyshakespeare.txt")
    data = shakespeare(folder)[0]
    rows = []
    for proj_type in ("std", "full"):
        for gap in args.gaps:
            runs = [run(data, args, gap, proj_type, seed) for seed in range(args.seeds)]
            energies = [energy for watch in runs for energy in watch.energies]
            if not energies:  # no second refresh within so few steps
                continue
            steps = sum((watch.steps for watch in runs), Counter())
            iterated = [n for n in steps.elements() if n]
            cost = [sum(watch.spent[name] for watch in runs) for name in ("subspace", "svd")]
            rows.append(
                [
                    proj_type,
                    gap,
                    len(energies),
                    min(energies),
                    statistics.median(energies),
                    steps[0] / len(energies),
                    statistics.fmean(iterated) if iterated else None,
                    cost[0] / cost[1],
                ]
            )
    share = ["least energy kept", "median"]
    print(
        Table(
            ["side", "gap", "refreshes", *share, "decomposed", "power steps", "time / SVD's"],
            rows,
            title=f"tinyshakespeare, bytes; width {args.width}, {args.layers} layers, rank "
            f"{args.rank}, {args.steps} steps of {args.batch} x 64 bytes, {args.seeds} seeds; "
            "energy relative to the exact SVD's",
            formats={
                **dict.fromkeys(share, ".4%"),
                "decomposed": ".1%",
                "power steps": ".1f",
                "time / SVD's": ".2f",
            },
        ).markdown()
    )


if __name__ == "__main__":
    main()
