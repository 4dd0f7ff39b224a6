"""RandLoRA beside PEFT's RandLoRA and LoRA: step, memory, file; and on turned digits.

    python benchmarks/randlora.py                  # everything, about five minutes on a core
    python benchmarks/randlora.py --part speed     # or memory, digits

Speed: a training step (forward, backward, AdamW) of the embedded encoder with adapters on all 36
linear layers; the ways take turns, CPU time, medians of their ratios to LoRA of the same r in the
same round. ``weights trained`` is the floor of every exact way: the same model with the weights
themselves trained (gradients only, no optimizer), whose products ``dy^T x`` RandLoRA's gradient
needs as well. Memory: the peak of a process of its own above what it held before the steps.
Digits: an MLP 64-128-128-10 that knows digits learns them turned by 90 degrees; each way at its
best learning rate. Least ranks: of the three updates, whose shorter sides are 64, 128 and 10; a
hidden unit that never fires gives Gamma no gradient, and at its even start the update has rank r.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adapter_digits as digits
import peft
import torch
from own_process import in_own_process, memory_status, reset_peak
from sentence_transformers import SentenceTransformer

from fullrank.adapters.randlora import RandLoraConfig
from fullrank.core import DEFAULT_ENCODER, Table, resolve_model

TARGETS = r"encoder\.layer\..*\.(query|key|value|dense)"
Step = Callable[[], None]


def encoder() -> Any:
    return SentenceTransformer(resolve_model(DEFAULT_ENCODER), device="cpu")[0].auto_model.float()


def lora(r: int) -> Any:
    return peft.LoraConfig(r=r, lora_alpha=r, target_modules=TARGETS)


def theirs(r: int) -> Any:
    return peft.RandLoraConfig(r=r, randlora_alpha=2 * r, target_modules=TARGETS)


def ours(r: int) -> Any:
    return RandLoraConfig(r=r, target_modules=TARGETS)


def lean(r: int) -> Any:
    return RandLoraConfig(r=r, target_modules=TARGETS, low_memory=True)


WAYS = {
    "LoRA (PEFT)": lora,
    "RandLoRA (PEFT)": theirs,
    "RandLoRA": ours,
    "RandLoRA, low memory": lean,
}
FLOOR = "weights trained"


def adapted(way: str, r: int) -> Any:
    torch.manual_seed(0)
    model = encoder()
    if way != FLOOR:
        return peft.get_peft_model(model, WAYS[way](r))
    pattern = peft.get_peft_model(copy.deepcopy(model), lora(r)).base_model.targeted_module_names
    model.requires_grad_(False)
    for name in pattern:
        model.get_submodule(name).weight.requires_grad_(True)
    return model


def stepper(model: Any, batch: int, length: int, optimize: bool) -> Step:
    tokens = torch.randint(1000, 20000, (batch, length), generator=torch.Generator().manual_seed(1))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step() -> None:
        model(input_ids=tokens).last_hidden_state.square().mean().backward()
        if optimize:
            optimizer.step()
        optimizer.zero_grad()

    return step


def speed(ranks: list[int], sizes: list[tuple[int, int]], rounds: int) -> None:
    rows = []
    for batch, length in sizes:
        for r in ranks:
            steps = {
                way: stepper(adapted(way, r), batch, length, way != FLOOR) for way in [*WAYS, FLOOR]
            }
            taken: dict[str, list[float]] = {way: [] for way in steps}
            for number in range(rounds + 1):
                for way, step in steps.items():
                    began = time.process_time()
                    step()
                    if number:
                        taken[way].append(time.process_time() - began)
            base = taken["LoRA (PEFT)"]
            for way, seconds in taken.items():
                ratio = statistics.median(s / b for s, b in zip(seconds, base, strict=True))
                rows.append([f"{batch} x {length}", r, way, statistics.median(seconds), ratio])
    columns = ["tokens", "r", "way", "CPU s a step", "of LoRA's"]
    formats = {columns[3]: ".3f", columns[4]: ".2f"}
    print(Table(columns, rows, f"Training steps, {rounds} rounds", formats).markdown())


def peak(way: str, r: int, batch: int, length: int) -> tuple[int, int, int]:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = adapted(way, r)
    # Warm up on one short text, so that libraries have what they keep.
    stepper(model, 1, 8, optimize=True)()
    before = memory_status("VmRSS")
    reset_peak()
    step = stepper(model, batch, length, optimize=True)
    step()
    step()
    found = memory_status("VmHWM") - before
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        size = (Path(folder) / "adapter_model.safetensors").stat().st_size
    return found, size, trained


def memory(ranks: list[int], batch: int, length: int) -> None:
    rows = []
    for r in ranks:
        for way in WAYS:
            most, size, trained = in_own_process(peak, way, r, batch, length)
            rows.append([r, way, trained, size / 1e6, most / 1e6])
    columns = ["r", "way", "trained", "file, MB", "peak of steps, MB"]
    formats = {"trained": ",d", columns[3]: ".2f", columns[4]: ".0f"}
    title = f"Adapter files and memory, {batch} x {length} tokens"
    print(Table(columns, rows, title, formats).markdown())


def on_digits(seeds: int) -> None:
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    # PEFT's scaling for all, with which the card's figures were made: s = 8 / sqrt(N).
    names = ["a", "b", "c"]
    ways: dict[str, Any] = {"full": None}
    ways["LoRA, r 9"] = peft.LoraConfig(r=9, lora_alpha=9, target_modules=names)
    for r in (4, 9):
        for kind in ("dense", "sparse"):
            config = RandLoraConfig(r=r, alpha=8.0 * r, bases=kind, target_modules=names)
            ways[f"RandLoRA, r {r}, {kind}"] = config
    ways["RandLoRA, r 10, dense"] = RandLoraConfig(r=10, alpha=80.0, target_modules=names)
    data, test = digits.digits(turned=True)
    bases = [digits.learnt(seed) for seed in range(seeds)]
    rows = []
    for way, config in ways.items():
        tried = []
        for lr in rates:
            runs = []
            for seed, base in enumerate(bases):
                torch.manual_seed(seed)
                model: Any = copy.deepcopy(base)
                if config is not None:
                    model = peft.get_peft_model(model, copy.deepcopy(config))
                losses = digits.train(model, data, digits.STEPS, lr, seed)
                trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
                found = model.base_model.delta_rank() if isinstance(config, RandLoraConfig) else {}
                final = statistics.fmean(losses[-20:])
                runs.append((final, digits.accuracy(model, test), trained, found))
            tried.append((statistics.fmean(run[0] for run in runs), lr, runs))
        _, lr, runs = min(tried)
        final, right, trained, found = zip(*runs, strict=True)
        each = [" / ".join(f"{v:.3f}" for v in values) for values in (final, right)]
        least = [str(min(run[name] for run in found)) for name in found[0]]
        rows.append([way, trained[0], f"{lr:g}", *each, ", ".join(least) or None])
    columns = ["way", "trained", "lr", "final loss", "test accuracy", "least ranks"]
    print(Table(columns, rows, f"Turned digits, {seeds} seeds").markdown())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", choices=["speed", "memory", "digits"])
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--sizes", nargs="+", default=["16x64", "32x128"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sizes = [(int(a), int(b)) for a, b in (size.split("x") for size in args.sizes)]
    if args.part in (None, "speed"):
        speed(args.ranks, sizes, args.rounds)
    if args.part in (None, "memory"):
        memory(args.ranks, *sizes[-1])
    if args.part in (None, "digits"):
        on_digits(args.seeds)


if __name__ == "__main__":
    main()
