"""Adapters on digits turned by 90 degrees: LoRA, EVA, LoRA-GA and full fine-tuning.

    python benchmarks/adapter_digits.py            # 3 seeds, four learning rates

An MLP 64-128-128-10 that knows scikit-learn's digits learns them turned, by adapters of rank 4 on
all three layers, in 150 steps of AdamW. Each way at its best learning rate (lowest mean final
loss over the seeds). Early: mean training loss of steps 10 to 30; final: of the last 20.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import numpy as np
import peft
import torch
from sklearn.datasets import load_digits
from torch import nn

from fullrank.adapters import eva, lora_ga
from fullrank.core import Table

RATES = (3e-3, 1e-2, 3e-2, 1e-1)
RANK, STEPS, BATCH = 4, 150, 64
Data = tuple[torch.Tensor, torch.Tensor]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 128), nn.Linear(128, 128), nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def digits(turned: bool) -> tuple[Data, Data]:
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8) / 16
    if turned:
        images = np.rot90(images, axes=(1, 2))
    x = torch.tensor(images.reshape(-1, 64).copy(), dtype=torch.float32)
    y = torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return (x[train], y[train]), (x[test], y[test])


def train(model: nn.Module, data: Data, steps: int, lr: float, seed: int) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        rows = torch.randint(len(data[0]), (BATCH,), generator=generator)
        loss = nn.functional.cross_entropy(model(data[0][rows]), data[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def learnt(seed: int) -> MLP:
    """A network that knows the digits upright."""
    torch.manual_seed(seed)
    base = MLP()
    train(base, digits(turned=False)[0], 400, 3e-3, seed)
    return base


def loss_fn(model: nn.Module, batch: Data) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def chunks(data: Data, seed: int, count: int = 8) -> list[Data]:
    generator = torch.Generator().manual_seed(1000 + seed)
    rows = torch.randint(len(data[0]), (count, BATCH), generator=generator)
    return [(data[0][r], data[1][r]) for r in rows]


def config(**options: object) -> peft.LoraConfig:
    return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["a", "b", "c"], **options)


def full(base: nn.Module, data: Data, seed: int) -> nn.Module:
    return base


def plain(base: nn.Module, data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return peft.get_peft_model(base, config())


def by_eva(base: nn.Module, data: Data, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    options = config(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0))
    model = peft.get_peft_model(base, options, low_cpu_mem_usage=True)
    batches = [x for x, _ in chunks(data, seed)]
    eva.initialize(model, batches, progress=False)
    return model


def by_gradient(scale: str) -> Callable[[nn.Module, Data, int], nn.Module]:
    def make(base: nn.Module, data: Data, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return lora_ga.initialize(
            base, chunks(data, seed), config(), scale=scale, loss_fn=loss_fn, progress=False
        )

    return make


WAYS = {
    "full": full,
    "LoRA": plain,
    "EVA": by_eva,
    "LoRA-GA": by_gradient("stable"),
    "LoRA-GA, PEFT's scaling": by_gradient("peft_stable"),
}


def accuracy(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (x, y), test = digits(turned=True)
    rows = []
    for name, make in WAYS.items():
        best = None
        for lr in RATES:
            runs = []
            for seed in range(args.seeds):
                model = make(learnt(seed), (x, y), seed)
                losses = train(model, (x, y), STEPS, lr, seed)
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                early, final = statistics.fmean(losses[10:30]), statistics.fmean(losses[-20:])
                runs.append((final, early, accuracy(model, test), trained))
            mean = statistics.fmean(r[0] for r in runs)
            if best is None or mean < best[0]:
                best = (mean, lr, runs)
        _, lr, runs = best
        final, early, right, trained = zip(*runs, strict=True)

        def each(values: tuple[float, ...]) -> str:
            return " / ".join(f"{v:.3f}" for v in values)

        rows.append([name, trained[0], f"{lr:g}", each(early), each(final), each(right)])
    columns = ["way", "trained", "lr", "early loss", "final loss", "test accuracy"]
    print(Table(columns, rows, f"Turned digits, rank {RANK}, {args.seeds} seeds").markdown())


if __name__ == "__main__":
    main()
