"""A training step of FlyLoRA and of Hydra against LoRA of PEFT with as many trained numbers.

    python benchmarks/flylora_hydra_speed.py

Three linear layers 384-384-1536-384 with GELU between them, 1024 rows that ask for a gradient, one
thread. A step is a forward and a backward pass; ways take turns, the median of their CPU times is
shown. FlyLoRA (r 32, k 8) counts its experts as in training; it trains r * out numbers a layer,
which is LoRA's r 16 in this stack. FlyLoRA and Hydra are their arithmetic on a plain module.
"""

from __future__ import annotations

import argparse
import statistics
import time

import peft
import torch
from torch import nn

from fullrank.adapters.flylora_routing import count, flylora_output, sparse_projection
from fullrank.adapters.hydra_branches import Branch, hydra_output
from fullrank.core import Table

LAYERS = ("0", "2", "4")


class FlyLora(nn.Module):
    def __init__(self, base: nn.Linear, r: int = 32, k: int = 8) -> None:
        super().__init__()
        self.base, self.groups = base, [(r, k)]
        self.A = sparse_projection(r, base.in_features, k / r)
        self.B = nn.Parameter(torch.zeros(base.out_features, r))
        self.d, self.counts = torch.zeros(r), torch.zeros(r)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base(x)
        y, taken = flylora_output(h, x, self.A, self.B, self.d, self.groups, 2.0)
        self.counts += count(taken)
        return y


class Hydra(nn.Module):
    def __init__(self, base: nn.Linear, r: int = 4) -> None:
        super().__init__()
        self.base = base
        widths = base.in_features, base.out_features
        self.A = nn.ParameterList(torch.randn(r, width) / width**0.5 for width in widths)
        self.B = nn.ParameterList(torch.zeros(base.out_features, r) for _ in widths)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parallel, sequential = (Branch(A, B) for A, B in zip(self.A, self.B, strict=True))
        return hydra_output(self.base(x), x, parallel, sequential)


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(384, 384), nn.GELU(), nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384)]
    return nn.Sequential(*layers).requires_grad_(False)


def wrapped(adapter: type[nn.Module]) -> nn.Module:
    model = stack()
    for name in LAYERS:
        model[int(name)] = adapter(model[int(name)])
    return model


def lora(r: int) -> nn.Module:
    return peft.get_peft_model(stack(), peft.LoraConfig(r=r, target_modules=list(LAYERS)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=25)
    args = parser.parse_args()
    torch.set_num_threads(1)
    pairs = {"LoRA r 16": lora(16), "FlyLoRA r 32, k 8": wrapped(FlyLora)}
    pairs |= {"LoRA r 8": lora(8), "Hydra 4 + 4": wrapped(Hydra)}
    x = torch.randn(1024, 384, requires_grad=True)
    times: dict[str, list[float]] = {way: [] for way in pairs}
    for repeat in range(args.repeats + 3):
        for way, model in pairs.items():
            began = time.process_time()
            model(x).square().mean().backward()
            if repeat >= 3:
                times[way].append(1e3 * (time.process_time() - began))
    rows, reference = [], 0.0
    for way, model in pairs.items():
        median = statistics.median(times[way])
        reference = median if way.startswith("LoRA") else reference
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        rows.append([way, trained, f"{median:.1f}", f"{median / reference:.2f}"])
    title = f"Forward and backward, CPU time, median of {args.repeats}"
    print(Table(["way", "trained", "ms", "of LoRA's"], rows, title).markdown())


if __name__ == "__main__":
    main()
