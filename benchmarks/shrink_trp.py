"""TRP's claims in small: what splitting costs a network that was trained with truncation.

    python benchmarks/shrink_trp.py --seeds 3
    FULLRANK_DATA=... python benchmarks/shrink_trp.py --only cifar

Digits: a network of three convolutions, the first of which stays whole; trained plainly, with
truncation, and with the nuclear norm beside it; accuracy before and after splitting, without any
fine-tuning; that of the plainly trained network at the same ranks; and that of each split at less
energy than it was trained at. CIFAR-10: a residual network, a few epochs. Cost: milliseconds of
a truncation of usual kernels beside torch's SVD.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time

import torch
from tiny_images import accuracy, cifar, digits, fit, mean_and_spread
from tiny_lm import data_folder
from torch import nn

from fullrank.compress.factorization import replace_modules
from fullrank.compress.layers_build import build_layer
from fullrank.compress.matrices_conv import matricise_conv
from fullrank.compress.trp import TRP
from fullrank.compress.trp_truncation import truncate
from fullrank.core import Table
from fullrank.core.rank_rules import Energy

WAYS = {
    "plain": None,
    "TRP": {"nuclear_weight": 0.0},
    "TRP + nuclear norm": {"nuclear_weight": 3e-4},
    "nuclear norm alone": {"nuclear_weight": 3e-4, "truncate": False},
}


def digit_net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    )


MEASURED = ("whole", "split", "plain", "below", "share")


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short = nn.Identity()
        if stride > 1 or channels != out:
            self.short = nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (y + self.short(x)).relu()


def residual_net(seed: int, width: int = 8) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()),
        *(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)),
    )


def trained(make, data, way, scheme: str, seed: int, epochs: int, energy: float, lr: float):
    """The network after training, and the TRP that trained (or only reads) it."""
    model = make(seed)
    trp = TRP(model, scheme, energy=energy, period=10, **(way or {"nuclear_weight": 0.0}))
    steps = epochs * -(-len(data.y) // 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1)
    # The subgradient is added between backward and the optimizer's step.
    optimizer.register_step_pre_hook(lambda *_: trp.after_backward())
    optimizer.register_step_post_hook(lambda *_: schedule.step())
    truncating = way is not None and way.get("truncate", True)

    def loss(model, x, y):
        if way is not None:
            trp.before_forward()
        return nn.functional.cross_entropy(model(x), y)

    fit(model, data, epochs, optimizer, seed, loss)
    if truncating:
        trp.refresh()
    return model, trp


def numbers(model: nn.Module, names) -> int:
    modules = dict(model.named_modules())
    return sum(
        p.numel() for name in names for k, p in modules[name].named_parameters() if k != "bias"
    )


def at_ranks_of(plan, model: nn.Module) -> nn.Module:
    """Another network of the same shape, split at these ranks."""
    small = copy.deepcopy(model)
    modules = dict(small.named_modules())
    split = {name: entry for name, entry in plan.items() if entry.rank is not None}
    replace_modules(small, {name: build_layer(modules[name], e) for name, e in split.items()})
    return small


def table(make, load, schemes, seeds: int, epochs: int, energy: float, below: float, lr: float):
    rows = []
    for scheme in schemes:
        plain: dict[int, nn.Module] = {}
        for name, way in WAYS.items():
            found: dict[str, list[float]] = {}
            for seed in range(seeds):
                data = load(seed)
                model, trp = trained(make, data, way, scheme, seed, epochs, energy, lr)
                plain.setdefault(seed, model)
                made, less = (trp.decompose(rule=Energy(e)) for e in (energy, below))
                other = at_ranks_of(trp.plan(Energy(energy)), plain[seed])
                share = numbers(made, trp.layers) / numbers(model, trp.layers)
                scores = [accuracy(m, data) for m in (model, made, other, less)]
                for key, value in zip(MEASURED, [*scores, share], strict=True):
                    found.setdefault(key, []).append(value)
            *scores, share = (found[key] for key in MEASURED)
            rows.append([scheme, name, *map(mean_and_spread, scores), sum(share) / seeds])
            print(*rows[-1], file=sys.stderr)
    columns = ["whole", f"split at {energy:g}", "plain, at those ranks", f"split at {below:g}"]
    return Table(
        ["scheme", "training", *columns, f"numbers left at {energy:g}"],
        rows,
        title=f"Accuracy; {epochs} epochs, period 10, {seeds} seeds",
        formats={f"numbers left at {energy:g}": ".0%"},
    )


def cost() -> Table:
    rows = []
    for shape in ((32, 32, 3, 3), (128, 128, 3, 3), (256, 256, 3, 3), (512, 512, 3, 3)):
        torch.manual_seed(0)
        conv = nn.Conv2d(*shape[1::-1], shape[2])
        for scheme in ("channel", "spatial", "decouple"):
            matrix = matricise_conv(conv, scheme).matrix
            times = []
            for run in (
                lambda m: truncate(m, 0.98),
                lambda m: torch.linalg.svd(m, full_matrices=False),
            ):
                run(matrix)
                best = float("inf")
                for _ in range(3):
                    began = time.process_time()
                    run(matrix)
                    best = min(best, time.process_time() - began)
                times.append(1e3 * best)
            rows.append(["x".join(map(str, shape)), scheme, *times, times[1] / times[0]])
    return Table(
        ["kernel", "scheme", "truncation, ms", "float32 SVD alone, ms", "ratio"],
        rows,
        title="One truncation, CPU time, one thread, best of 3",
        formats={"truncation, ms": ".2f", "float32 SVD alone, ms": ".2f", "ratio": ".1f"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--energy", type=float, default=0.9)
    parser.add_argument("--below", type=float, default=0.8)
    parser.add_argument("--schemes", nargs="+", default=["channel", "spatial", "decouple"])
    parser.add_argument("--images", type=int, default=3000, help="of CIFAR-10")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["digits", "cifar", "cost"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shared = (args.seeds, args.epochs, args.energy, args.below)
    if args.only in (None, "cost"):
        print(cost().markdown(), end="\n\n")
    if args.only in (None, "digits"):
        print(table(digit_net, digits, args.schemes, *shared, lr=0.05).markdown(), end="\n\n")
    if args.only in (None, "cifar"):
        if (folder := data_folder()) is None:
            print("FULLRANK_DATA is not set: no CIFAR-10.", file=sys.stderr)
            return
        data = cifar(folder, args.images, 1000)
        print(table(residual_net, lambda _: data, args.schemes, *shared, lr=0.1).markdown())


if __name__ == "__main__":
    main()
