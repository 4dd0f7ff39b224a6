"""How much each task loses when FlyLoRA tasks are merged, beside LoRA.

    python benchmarks/flylora_merging.py            # 3 seeds, four learning rates

The tasks of `adapter_merging.py`: an MLP that knows digits learns them turned and, apart from
that, mirrored, on all three layers in 150 steps of AdamW. FlyLoRA (r 16, k 4, a projection of its
own for each task, the bias moved after each step, its arithmetic on a plain module) and LoRA of
PEFT (r 4), each at its best learning rate: highest mean accuracy of the tasks alone. Merged by
adding the tasks' outputs with weights 0.5 and 1, which is exact for both. Test accuracy, mean and
spread (max - min) over the seeds; kept: merged over alone, mean over tasks and seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence

import peft
import torch
from adapter_digits import MLP, STEPS, Data, accuracy, config, digits, train
from adapter_merging import mirrored
from torch import nn

from fullrank.adapters.flylora_merging import Experts, merge_experts
from fullrank.adapters.flylora_routing import count, rebalance, sparse_projection
from fullrank.adapters.merging import merge_adapters
from fullrank.core import Table

RATES = (3e-3, 1e-2, 3e-2, 1e-1)
WEIGHTS = (0.5, 1.0)
R, K, UPDATE = 16, 4, 1e-3
Scores = dict[str, list[float]]


class FlyLora(nn.Module):
    """A frozen layer with experts that are trained, or were."""

    def __init__(self, base: nn.Linear, experts: Experts) -> None:
        super().__init__()
        self.base, self.experts = base, experts
        self.B = nn.Parameter(experts.B)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        e = self.experts
        now = Experts(e.A, self.B, e.d, e.groups, e.scale)
        y, taken = now(self.base(x), x)
        if self.training:
            # One forward pass a step here, so that its end is the end of the step.
            self.experts = Experts(
                e.A, e.B, rebalance(e.d, count(taken), UPDATE), e.groups, e.scale
            )
        return y


def fresh(base: nn.Linear, seed: int) -> Experts:
    A = sparse_projection(R, base.in_features, K / R, seed)
    return Experts(A, torch.zeros(base.out_features, R), torch.zeros(R), [(R, K)], 2.0)


def with_experts(base: nn.Module, experts: Sequence[Experts]) -> nn.Module:
    model = copy.deepcopy(base).requires_grad_(False)
    for name, own in zip("abc", experts, strict=True):
        setattr(model, name, FlyLora(getattr(model, name), own))
    return model


def by_flylora(
    base: nn.Module, tasks: dict[str, tuple[Data, Data]], lr: float, seed: int
) -> Scores:
    found: Scores = {"alone": []}
    trained: list[list[Experts]] = []
    for number, (data, test) in enumerate(tasks.values()):
        seeds = [1000 * seed + 10 * number + i for i in range(3)]
        layers = [getattr(base, name) for name in "abc"]
        model = with_experts(base, [fresh(x, s) for x, s in zip(layers, seeds, strict=True)])
        train(model, data, STEPS, lr, seed)
        model.eval()
        found["alone"].append(accuracy(model, test))
        trained.append([getattr(model, name).experts for name in "abc"])
    for weight in WEIGHTS:
        merged = [merge_experts(parts, [weight] * 2) for parts in zip(*trained, strict=True)]
        model = with_experts(base, merged).eval()
        found[f"{weight:g}"] = [accuracy(model, test) for _, test in tasks.values()]
    return found


def by_lora(base: nn.Module, tasks: dict[str, tuple[Data, Data]], lr: float, seed: int) -> Scores:
    torch.manual_seed(seed)
    found: Scores = {"alone": []}
    model = peft.get_peft_model(copy.deepcopy(base), config(), "turned")
    model.add_adapter("mirrored", config())
    for task, (data, test) in tasks.items():
        model.set_adapter(task)
        train(model, data, STEPS, lr, seed)
        found["alone"].append(accuracy(model, test))
    for weight in WEIGHTS:
        merge_adapters(model, list(tasks), [weight] * 2, into="merged")
        model.set_adapter("merged")
        found[f"{weight:g}"] = [accuracy(model, test) for _, test in tasks.values()]
        model.delete_adapter("merged")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {"turned": digits(turned=True), "mirrored": mirrored()}
    bases = []
    for seed in range(args.seeds):
        torch.manual_seed(seed)
        bases.append(MLP())
        train(bases[-1], digits(turned=False)[0], 400, 3e-3, seed)
    rows = []
    for name, run in {"FlyLoRA": by_flylora, "LoRA": by_lora}.items():
        tried = {lr: [run(base, tasks, lr, s) for s, base in enumerate(bases)] for lr in RATES}
        lr = max(RATES, key=lambda rate: sum(sum(found["alone"]) for found in tried[rate]))
        for way in ("alone", *(f"{weight:g}" for weight in WEIGHTS)):
            cells = [
                f"{statistics.fmean(values):.3f} ({max(values) - min(values):.3f})"
                for values in zip(*(found[way] for found in tried[lr]), strict=True)
            ]
            kept = statistics.fmean(
                after / before
                for found in tried[lr]
                for after, before in zip(found[way], found["alone"], strict=True)
            )
            label = way if way == "alone" else f"merged, weights {way}"
            rows.append([name, f"{lr:g}", label, *cells, f"{kept:.2f}"])
    columns = ["method", "lr", "way", *tasks, "kept"]
    print(Table(columns, rows, f"Two tasks merged, {args.seeds} seeds").markdown())


if __name__ == "__main__":
    main()
