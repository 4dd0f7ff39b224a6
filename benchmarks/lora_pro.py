"""LoRA-Pro: the step's CPU time beside the official code's, and the paper's claims in small.

    git -C LoRA-Pro show a186872:peta/optim.py > optim.py     # of github.com/mrflogs/LoRA-Pro
    python benchmarks/lora_pro.py --official optim.py
    FULLRANK_DATA=... python benchmarks/lora_pro.py --seeds 3

Speed: one process, one thread, 21 matrices of 512 to 1376, rank 8, float32, CPU time, in turns.
The official optimizer module (its first release; later ones sit inside DeepSpeed) is read from a
file and gets the same factors and gradients. Its mode "full" keeps its moments in bfloat16; a
second row has them in float32, where results can be compared. Without the file its rows are
missing.

Least squares: a 32 x 48 target at a distance of decaying spectrum, ill-conditioned inputs, rank
4, s = 2, 200 full-batch steps. The best loss that rank 4 allows is printed.

Language model (with FULLRANK_DATA): a small byte model trained on WikiText-2, then fine-tuned on
tinyshakespeare by full fine-tuning, LoRA and LoRA-Pro, each at the best of the same rates.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import sys
import time
import types
import warnings
from pathlib import Path

import torch
from tiny_lm import bits_per_byte, clone, data_folder, pretrained, shakespeare, train
from torch import nn

from fullrank.core import Table
from fullrank.optim import memory_table
from fullrank.optim.lora_pro import LoRAPro
from fullrank.optim.memory import human_bytes

SHAPES = [(512, 512)] * 12 + [(1376, 512)] * 6 + [(512, 1376)] * 3
S = 2.0


# -- speed -----------------------------------------------------------------------------------


def official_module(path: str, moments: str) -> types.ModuleType:
    """The official module without the imports that it does not use, and without a debug print."""
    source = Path(path).read_text()
    unused = r"^(import peft|import wandb|from transformers .*|from scipy.*)$"
    source = re.sub(unused, "", source, flags=re.MULTILINE)
    source = source.replace("print(n, p.shape, p.grad)", "pass")
    if moments == "float32":
        source = source.replace(".to(torch.bfloat16)", "")
    module = types.ModuleType("official_lora_pro")
    exec(compile(source, path, "exec"), module.__dict__)
    return module


def factors(rank: int):
    generator = torch.Generator().manual_seed(0)
    pairs = [
        (
            torch.randn(rank, n, generator=generator) / n**0.5,
            0.01 * torch.randn(m, rank, generator=generator),
        )
        for m, n in SHAPES
    ]
    gradients = [1e-2 * torch.randn(shape, generator=generator) for shape in SHAPES]
    return pairs, gradients


def milliseconds(work) -> float:
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began)


def speed(official: str | None, rank: int, steps: int) -> Table:
    start, gradients = factors(rank)
    whole = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    for weight, gradient in zip(whole, gradients, strict=True):
        weight.grad = gradient
    fused = torch.optim.AdamW(whole, lr=1e-4, fused=True)
    unit = statistics.median([milliseconds(fused.step) for _ in range(steps)][1:])
    rows = []
    cases = [("sgd", "-"), ("efficient", "-"), ("full", "bfloat16"), ("full", "float32")]
    for mode, moments in cases:
        made = {}
        ours = [tuple(nn.Parameter(t.clone()) for t in pair) for pair in start]
        options = {"optimizer": "sgd"} if mode == "sgd" else {"mode": mode}
        if moments == "bfloat16":
            options["state_dtype"] = torch.bfloat16
        made["fullrank"] = (ours, LoRAPro([(*p, S) for p in ours], lr=1e-3, **options))
        if official:
            theirs = [tuple(nn.Parameter(t.clone()) for t in pair) for pair in start]
            named = [
                (f"m{i}.lora_{letter}.default.weight", half)
                for i, pair in enumerate(theirs)
                for letter, half in zip("AB", pair, strict=True)
            ]
            module = official_module(official, moments)
            common = {"scaling_factor": S, "lr": 1e-3}
            made["official"] = (
                theirs,
                module.SGD(named, **common)
                if mode == "sgd"
                else module.AdamW(named, weight_decay=0.0, eps=1e-8, mode=mode, **common),
            )
        times: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(steps):
            for name, (pairs, optimizer) in made.items():
                for (A, B), G in zip(pairs, gradients, strict=True):
                    A.grad, B.grad = S * B.detach().T @ G, S * G @ A.detach().T
                times[name].append(milliseconds(optimizer.step))
        median = {name: statistics.median(each[1:]) for name, each in times.items()}
        apart = None
        if official:
            apart = max(
                float((a - b).norm() / b.norm())
                for p, q in zip(ours, made["official"][0], strict=True)
                for a, b in zip(p, q, strict=True)
            )
        theirs_ms = median.get("official")
        ratio = theirs_ms / median["fullrank"] if theirs_ms else None
        state = memory_table(made["fullrank"][1]).rows[-1][5]
        rows.append([mode, moments, median["fullrank"], theirs_ms, ratio, apart, state])
    columns = ["mode", "moments", "fullrank, ms", "official, ms", "ratio", "apart", "state"]
    return Table(
        columns,
        rows,
        title=f"{len(SHAPES)} pairs of rank {rank}, float32, one thread, CPU time of a step; a "
        f"fused AdamW step on the whole matrices takes {unit:.1f} ms; 'apart' is the largest "
        f"relative distance of a factor after {steps} steps",
        formats={
            **dict.fromkeys(["fullrank, ms", "official, ms", "ratio"], ".2f"),
            "apart": ".1e",
            "state": human_bytes,
        },
    )


# -- least squares ---------------------------------------------------------------------------


class LeastSquares:
    """Loss ``|(W0 + s B A - T) X|^2 / 2`` with X of a decaying spectrum, and its gradient."""

    def __init__(self, seed: int, m: int = 32, n: int = 48, rank: int = 4):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        def orthonormal(rows, columns):
            return torch.linalg.qr(draw(rows, columns))[0]

        self.W0 = draw(m, n) / n**0.5
        decay = 0.7 ** torch.arange(m, dtype=torch.float64)
        self.gap = (orthonormal(m, m) * decay) @ orthonormal(n, m).T
        spectrum = torch.logspace(0, -1.5, n, dtype=torch.float64)
        Q = orthonormal(n, n)
        self.covariance = (Q * spectrum) @ Q.T
        self.root = (Q * spectrum.sqrt()) @ Q.T
        self.A = draw(rank, n) / n**0.5
        self.B = torch.zeros(m, rank, dtype=torch.float64)
        self.rank = rank

    def loss(self, delta):
        return 0.5 * ((delta - self.gap) @ self.root).square().sum().item()

    def gradient(self, delta):
        return (delta - self.gap) @ self.covariance

    def best(self):
        singular = torch.linalg.svdvals(self.gap @ self.root)
        return 0.5 * singular[self.rank :].square().sum().item()


def descend(problem: LeastSquares, method: str, lr: float, steps: int) -> float:
    """Loss after full-batch steps; infinite where they diverge."""
    if method.startswith("full fine-tuning"):
        weight = nn.Parameter(torch.zeros_like(problem.W0))
        adam = method.endswith("Adam")
        kind = torch.optim.AdamW if adam else torch.optim.SGD
        optimizer = kind([weight], lr=lr, weight_decay=0.0)
        for _ in range(steps):
            weight.grad = problem.gradient(weight.detach())
            optimizer.step()
        return problem.loss(weight.detach())
    A, B = nn.Parameter(problem.A.clone()), nn.Parameter(problem.B.clone())
    optimizer = {
        "LoRA, GD": lambda: torch.optim.SGD([A, B], lr=lr),
        "LoRA, Adam": lambda: torch.optim.AdamW([A, B], lr=lr, weight_decay=0.0),
        "LoRA-Pro, GD": lambda: LoRAPro([(A, B, S)], lr=lr, optimizer="sgd"),
        "LoRA-Pro full": lambda: LoRAPro([(A, B, S)], lr=lr),
        "LoRA-Pro efficient": lambda: LoRAPro([(A, B, S)], lr=lr, mode="efficient"),
    }[method]()
    for _ in range(steps):
        a, b = A.detach(), B.detach()
        G = problem.gradient(S * b @ a)
        if not torch.isfinite(G).all() or G.norm() > 1e6:
            return float("inf")
        A.grad, B.grad = S * b.T @ G, S * G @ a.T
        optimizer.step()
    return problem.loss(S * B.detach() @ A.detach())


def least_squares(seeds: int, steps: int = 200) -> Table:
    problems = [LeastSquares(seed) for seed in range(seeds)]
    gd = [0.05, 0.1, 0.2, 0.5, 1.0, 1.7]
    adam = [1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2]
    methods = {
        "full fine-tuning, GD": gd,
        "LoRA-Pro, GD": gd,
        "LoRA, GD": gd,
        "full fine-tuning, Adam": adam,
        "LoRA-Pro full": adam,
        "LoRA-Pro efficient": adam,
        "LoRA, Adam": adam,
    }
    rows = []
    for method, rates in methods.items():
        means = {
            lr: statistics.fmean(descend(p, method, lr, steps) for p in problems) for lr in rates
        }
        best = min(means, key=means.__getitem__)
        rows.append([method, best, means[best], rates[0], means[rates[0]], means[rates[-1]]])
    return Table(
        ["method", "best lr", "loss", "least lr", "loss there", "loss at the largest lr"],
        rows,
        title=f"least squares, {steps} steps, {seeds} seeds; the best of rank 4 is "
        f"{statistics.fmean(p.best() for p in problems):.5f}, before training "
        f"{statistics.fmean(p.loss(0 * p.W0) for p in problems):.4f}",
        formats=dict.fromkeys(["loss", "loss there", "loss at the largest lr"], ".5f"),
    )


# -- a language model ------------------------------------------------------------------------


class Lora(nn.Module):
    """A linear layer with a pair beside it."""

    def __init__(self, layer: nn.Linear, rank: int):
        super().__init__()
        self.layer = layer.requires_grad_(False)
        m, n = layer.weight.shape
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, m, bias=False)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.scaling = {"default": S}

    def forward(self, x):
        return self.layer(x) + S * self.lora_B["default"](self.lora_A["default"](x))


def with_lora(model, rank: int):
    model = clone(model).requires_grad_(False)
    for block in model.blocks:
        for name, layer in list(block.named_children()):
            if isinstance(layer, nn.Linear):
                setattr(block, name, Lora(layer, rank))
    return model


def language_model(folder: Path, seeds: int, pre: int, steps: int, width: int, rank: int) -> Table:
    base = pretrained(folder, width, 2, pre)
    data, test = shakespeare(folder)
    methods = {
        "full fine-tuning": None,
        "LoRA-Pro full": {},
        "LoRA-Pro efficient": {"mode": "efficient"},
        "LoRA": None,
    }
    rates = [1e-3, 3e-3, 1e-2, 3e-2]

    def once(method, lr, seed):
        torch.manual_seed(seed)
        if method == "full fine-tuning":
            model = clone(base)
            layers = [p for block in model.blocks for p in block.parameters() if p.dim() == 2]
            optimizer = torch.optim.AdamW(layers, lr=lr, weight_decay=0.0)
        else:
            model = with_lora(base, rank)
            trainable = [p for p in model.parameters() if p.requires_grad]
            options = methods[method]
            optimizer = (
                torch.optim.AdamW(trainable, lr=lr, weight_decay=0.0)
                if options is None
                else LoRAPro(model, lr=lr, **options)
            )
        train(model, optimizer, data, steps, seed + 1)
        return bits_per_byte(model, test)

    rows = []
    for method in methods:
        first = {lr: once(method, lr, 0) for lr in rates}
        best = min(first, key=first.__getitem__)
        found = [first[best]] + [once(method, best, seed) for seed in range(1, seeds)]
        spread = statistics.stdev(found) if seeds > 1 else None
        rows.append([method, best, statistics.fmean(found), spread])
    return Table(
        ["method", "best lr", "bits per byte", "spread"],
        rows,
        title=f"byte model of width {width}, {pre} steps on WikiText-2, then {steps} on "
        f"tinyshakespeare, rank {rank}, {seeds} seed(s); before: {bits_per_byte(base, test):.3f}",
        formats=dict.fromkeys(["bits per byte", "spread"], ".4f"),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", help="the official optim.py (see above)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12, help="steps timed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["speed", "least-squares", "lm"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only in (None, "speed"):
        if args.official is None:
            print("no --official file: its rows are missing.", file=sys.stderr)
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            print(speed(args.official, args.rank, args.rounds).markdown(), end="\n\n")
    if args.only in (None, "least-squares"):
        print(least_squares(args.seeds).markdown(), end="\n\n")
    if args.only in (None, "lm"):
        if (folder := data_folder()) is None:
            print("FULLRANK_DATA is not set: no language model.", file=sys.stderr)
            return
        table = language_model(folder, args.seeds, args.pretrain, args.steps, args.width, args.rank)
        print(table.markdown())


if __name__ == "__main__":
    main()
