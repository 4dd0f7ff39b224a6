"""GradNormLoRP's claims in small: loss beside GaLore's, bad scaling, norms of the official form.

    FULLRANK_DATA=... python benchmarks/optimizer_gradnormlorp.py          # all of it
    python benchmarks/optimizer_gradnormlorp.py scaling                    # or: text, norms

``text``: a Transformer over the bytes of tinyshakespeare; every optimizer gets the same grid of
learning rates on one seed, and the best one of it on all seeds. What is not projected is stepped
by AdamW with the same rate in all, and the projected matrices get ``scale`` of it (AdamW too: its
body's rate is a quarter of its head's).
``scaling``: least squares whose weight has rows of very different size (10 to the power of a
uniform number in [-2, 2]); the condition number of what is projected, and the steps to a loss.
``norms``: how far the row norms of the official form are from those of the direction it keeps.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from tiny_lm import TinyLM, bits_per_byte, data_folder, shakespeare, train
from torch import nn

from fullrank.core import Table
from fullrank.optim import GaLoreAdamW, GradNormLoRPAdamW, param_groups, weight_norm_gradients

SCALE = 0.25


def spread(values: list[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


# -- a language model ------------------------------------------------------------------------


def adamw(model, lr, rank, gap):
    groups = param_groups(model, rank=rank, verbose=False)
    body, rest = (group["params"] for group in groups)
    groups = [{"params": body, "lr": SCALE * lr}, {"params": rest}]
    return torch.optim.AdamW(groups, lr=lr, eps=1e-6, weight_decay=0.0)


def projected(kind, **options):
    def make(model, lr, rank, gap):
        own = {"scale": SCALE, "update_proj_gap": gap, **options}
        return kind(param_groups(model, kind, rank=rank, verbose=False, **own), lr=lr)

    return make


def slow_magnitudes(model, lr, rank, gap):
    return projected(GradNormLoRPAdamW, magnitude_lr=lr / 10)(model, lr, rank, gap)


MAKERS = {
    "AdamW": adamw,
    "GaLore": projected(GaLoreAdamW),
    "GradNormLoRP": projected(GradNormLoRPAdamW),
    "GradNormLoRP, magnitude_lr = lr / 10": slow_magnitudes,
    "GradNormLoRP, official": projected(GradNormLoRPAdamW, mode="official"),
}


def text(args: argparse.Namespace) -> None:
    if (folder := data_folder()) is None:
        print("text: set FULLRANK_DATA to the data folder", file=sys.stderr)
        return
    data, test = shakespeare(folder)

    def once(make, lr, seed):
        torch.manual_seed(seed)
        model = TinyLM(args.width, args.layers)
        train(model, make(model, lr, args.rank, args.gap), data, args.steps, seed)
        return bits_per_byte(model, test)

    rows = []
    for name, make in MAKERS.items():
        grid = {lr: once(make, lr, 0) for lr in args.rates}
        best = min(grid, key=grid.get)
        found = [grid[best]] + [once(make, best, seed) for seed in range(1, args.seeds)]
        rows.append([name, *grid.values(), best, statistics.fmean(found), spread(found)])
    rates = [f"lr {lr:g}" for lr in args.rates]
    print(
        Table(
            ["optimizer", *rates, "best", "mean over seeds", "std"],
            rows,
            title=f"bits per byte of tinyshakespeare; width {args.width}, {args.layers} layers, "
            f"rank {args.rank}, gap {args.gap}, scale {SCALE}, {args.steps} steps of 16 x 64 "
            f"bytes, {args.seeds} seeds",
            formats={**dict.fromkeys([*rates, "mean over seeds", "std"], ".4f")},
        ).markdown()
    )


# -- rows of very different size ---------------------------------------------------------------


def problem(seed: int, m: int = 48, n: int = 32, count: int = 256):
    generator = torch.Generator().manual_seed(seed)
    size = 10 ** (4.0 * torch.rand(m, 1, generator=generator) - 2.0)
    start = size * torch.randn(m, n, generator=generator) / n**0.5
    target = size * torch.randn(m, n, generator=generator) / n**0.5
    x = torch.randn(count, n, generator=generator)
    return start, x, x @ target.t(), size


def condition(gradient: torch.Tensor, rank: int) -> float:
    """Largest over smallest singular value of what a projection to the leading ones keeps."""
    values = torch.linalg.svdvals(gradient.double())
    return float(values[0] / values[rank - 1])


def steps_to(make, lr: float, seed: int, share: float, most: int) -> int | None:
    """Steps until the loss, relative to each row's size, has fallen to a share; None: never."""
    start, x, y, size = problem(seed)
    weight = nn.Parameter(start.clone())
    optimizer = make(weight, lr)
    first = None
    for t in range(most):
        error = x @ weight.t() - y
        with torch.no_grad():
            relative = float((error / size.t()).square().mean())
        first = first or relative
        if relative <= share * first:
            return t
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
    return None


def scaling(args: argparse.Namespace) -> None:
    rank = 8
    options = {"rank": rank, "update_proj_gap": 20, "scale": 1.0}
    makers = {
        "GaLore": lambda w, lr: GaLoreAdamW([w], lr=lr, **options),
        "GradNormLoRP": lambda w, lr: GradNormLoRPAdamW([w], lr=lr, **options),
    }
    seeds = range(args.seeds)
    conditions: dict[str, list[float]] = {name: [] for name in makers}
    for seed in seeds:
        start, x, y, _ = problem(seed)
        weight = nn.Parameter(start.clone())
        (x @ weight.t() - y).square().mean().backward()
        norm = start.norm(dim=1, keepdim=True)
        direction, _ = weight_norm_gradients(start, weight.grad, norm, norm)
        conditions["GaLore"].append(condition(weight.grad, rank))
        conditions["GradNormLoRP"].append(condition(direction, rank))
    rows = []
    for name, make in makers.items():
        for lr in args.scaling_rates:
            found = [steps_to(make, lr, seed, 0.5, args.most) for seed in seeds]
            reached = [t for t in found if t is not None]
            rows.append(
                [
                    name,
                    statistics.geometric_mean(conditions[name]),
                    lr,
                    f"{len(reached)} of {len(found)}",
                    statistics.fmean(reached) if reached else None,
                    spread(reached),
                ]
            )
    print(
        Table(
            ["optimizer", "condition", "lr", "runs that reach half", "steps", "std"],
            rows,
            title="least squares, 48 x 32, rows of 10^U(-2, 2); condition number of the projected "
            f"gradient at the start (rank {rank}), steps until the loss relative to each row's "
            f"size has halved, at most {args.most}; {args.seeds} seeds",
            formats={"condition": ".1f", "steps": ".0f", "std": ".0f"},
        ).markdown()
    )


# -- the official form -------------------------------------------------------------------------


def norms(args: argparse.Namespace) -> None:
    rows = []
    for lr in args.rates:
        most = 0.0
        for seed in range(args.seeds):
            start, x, y, _ = problem(seed)
            weight = nn.Parameter(start.clone())
            optimizer = GradNormLoRPAdamW([weight], lr=lr, rank=8, mode="official")
            for _ in range(100):
                optimizer.zero_grad()
                (x @ weight.t() - y).square().mean().backward()
                optimizer.step()
                direction = optimizer.state[weight]["direction"]
                apart = (weight.norm(dim=1) - direction.norm(dim=1)).detach().abs().max()
                most = max(most, float(apart) / lr)
        rows.append([lr, most])
    # Adam's bias-corrected step is at most lr (1 - b1) / sqrt(1 - b2), and near lr as a rule.
    print(
        Table(
            ["lr", "largest difference / lr"],
            rows,
            title="official form: row norms of the weight against those of the direction it keeps, "
            f"over 100 steps and {args.seeds} seeds",
            formats={"largest difference / lr": ".3f"},
        ).markdown()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["text", "scaling", "norms"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=int, default=96)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=24)
    parser.add_argument("--gap", type=int, default=50)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 3e-2, 1e-1])
    parser.add_argument("--scaling-rates", type=float, nargs="+", default=[1e-2, 1e-1, 1.0])
    parser.add_argument("--most", type=int, default=2000, help="steps of the scaling problem")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, work in {"text": text, "scaling": scaling, "norms": norms}.items():
        if args.part in (None, name):
            work(args)
            print()


if __name__ == "__main__":
    main()
