"""Peak memory of a training step: stepping layer by layer against AdamW, and what was promised.

    python benchmarks/optimizer_memory.py

Each row trains the same Transformer in a process of its own. "Census" is the most bytes of tensors
that were alive at once in a step, counted at every operation; "resident" is how far the process'
memory rose over that before the model was made (its high-water mark). What is promised are the
weights, the optimizer's state by its formula, and what a forward and a backward pass take beside
them without any optimizer: activations, and gradients that are all kept, or, with a step for each
layer, used and freed one by one. What the census has above that are arrays to work in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from own_process import in_own_process, memory_status, reset_peak
from tiny_lm import TinyLM, loss_of

from fullrank.bench.memory import Census
from fullrank.core import Table
from fullrank.optim import (
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdamW,
    frugal_param_groups,
    param_groups,
    state_bytes,
    step_per_layer,
)
from fullrank.optim.memory import human_bytes


@dataclass
class Contestant:
    make: Callable
    per_layer: bool = False
    options: dict = field(default_factory=dict)


def projected(kind, rank: int, gap: int, **options):
    def make(model):
        group = {"rank": rank, "update_proj_gap": gap, "refresh": "subspace", "verbose": False}
        return kind(param_groups(model, kind, **group), lr=1e-3, **options)

    return make


def contestants(rank: int, gap: int) -> dict[str, Contestant]:
    def columns(model):
        groups = frugal_param_groups(model, subspace="columns", density=0.25, update_gap=gap)
        return FrugalAdamW(groups, lr=1e-3)

    adamw = torch.optim.AdamW
    eight = projected(GaLoreAdamW, rank, gap, state_bits=8)
    return {
        "AdamW (fused)": Contestant(lambda m: adamw(m.parameters(), fused=True)),
        "AdamW (foreach)": Contestant(lambda m: adamw(m.parameters(), foreach=True)),
        "GaLoreAdamW": Contestant(projected(GaLoreAdamW, rank, gap)),
        "GaLoreAdamW, by layer": Contestant(projected(GaLoreAdamW, rank, gap), per_layer=True),
        "GaLoreAdamW, 8 bits, by layer": Contestant(eight, per_layer=True),
        "FiraAdamW, by layer": Contestant(projected(FiraAdamW, rank, gap), per_layer=True),
        "FrugalAdamW columns, by layer": Contestant(columns, per_layer=True),
    }


def measure(name: str, args: argparse.Namespace, census: bool) -> dict[str, float]:
    """Peaks over some steps, of which one refreshes; the first ones allocate."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    contestant = contestants(args.rank, gap=3)[name]
    x = torch.randint(0, 256, (args.batch, 65))
    reset_peak()
    before = memory_status("VmRSS")
    model = TinyLM(args.width, args.layers)
    optimizer = contestant.make(model)
    handle = step_per_layer(optimizer) if contestant.per_layer else None

    def step():
        loss_of(model, x).backward()
        if handle is None:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(3):
        step()
    if not census:
        reset_peak()
        for _ in range(4):
            step()
        return {"resident": memory_status("VmHWM") - before}
    weights = list(model.parameters())
    found = {"state": state_bytes(optimizer), "weights": size_of(weights)}
    # Not kept in a variable: a refresh replaces some of them.
    state = (value for each in optimizer.state.values() for value in each.values())
    with Census([*weights, *state, x]) as mode:
        mode.restart()
        for _ in range(4):
            step()
        return {**found, "census": mode.most}


def size_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def of_passes(args: argparse.Namespace, frees: bool) -> dict[str, float]:
    """What a forward and a backward pass take beside the weights, at most."""
    torch.set_num_threads(1)
    model, x = TinyLM(args.width, args.layers), torch.randint(0, 256, (args.batch, 65))
    if frees:
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with Census([*model.parameters(), x]) as mode:
        for _ in range(2):
            mode.restart()
            loss_of(model, x).backward()
            model.zero_grad()
        return {"passes": mode.most - size_of(model.parameters())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1, help="sequences of 64 bytes")
    args = parser.parse_args()
    if not sys.platform.startswith("linux"):
        sys.exit("the high-water mark of a process' memory is read from /proc: Linux only")
    passes = {frees: in_own_process(of_passes, args, frees)["passes"] for frees in (False, True)}
    rows, first = [], None
    for name, contestant in contestants(args.rank, 3).items():
        found = {
            **in_own_process(measure, name, args, True),
            **in_own_process(measure, name, args, False),
        }
        promised = found["weights"] + found["state"] + passes[contestant.per_layer]
        peaks = promised, found["census"], found["resident"]
        first = first or peaks
        saved = [a - b for a, b in zip(first, peaks, strict=True)]
        rows.append([name, found["state"], *peaks, *(saved if peaks is not first else [None] * 3)])
    sizes = ["state", "promised", "census", "resident"]
    savings = [f"saved, {name}" for name in sizes[1:]]
    print(
        Table(
            ["optimizer", *sizes, *savings],
            rows,
            title=f"peak of a training step; width {args.width}, {args.layers} layers, float32, "
            f"rank {args.rank}, {args.batch} x 64 bytes; savings against the first row",
            formats=dict.fromkeys([*sizes, *savings], _signed),
        ).markdown()
    )


def _signed(count: float) -> str:
    return human_bytes(int(count)) if count >= 0 else f"-{human_bytes(-int(count))}"


if __name__ == "__main__":
    main()
