"""One step of each subspace optimizer, in units measured in the same process: CPU time, one thread.

    python benchmarks/optimizers_step.py [--processes 5] [--official FOLDER]

T_g is what two bare matrix products a weight take, into and out of the subspace; T_f is one fused
AdamW step of all weights. A step's bar is given in these units. All contestants step the same 21
matrices (9.49 million parameters, float32, rank 128) with the same gradients, in turns; each
figure is the median over rounds, and over processes. Gradients have a power-law spectrum and turn
a little between rounds. A refresh is by warm-started iteration; the one by SVD is measured with
``--svd``. With ``--bfloat16`` the projected ones are measured with ``gemm="bfloat16"`` too, in a
column of their own (benchmarks/optimizer_gemm.py says what that does to the loss).

FOLDER holds checkouts of the official repositories, under the names Fira, FRUGAL and
GradNormLoRP; those that are there are measured in the same run, and GaLore's where the package
galore-torch is installed. They need the package transformers.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import subprocess
import sys
import types
from pathlib import Path

import torch
from galore import GAP, SHAPES, bare_products, matrices, milliseconds, official_adamw

from fullrank.core import Table
from fullrank.optim import FiraAdamW, FrugalAdamW, GaLoreAdamW, GradNormLoRPAdamW

# Bars as (T_g, T_f) of a normal step, and of a refresh.
BARS = {
    "GaLore": ((1.25, 1), (2.6, 1)),
    "Fira": ((1.4, 2), (2.8, 2)),
    "FRUGAL svd": ((1.9, 2), (3.2, 2)),
    "FRUGAL random": ((1.9, 2), (3.2, 2)),
    "FRUGAL columns": ((0, 4), (0, 4)),
    "FRUGAL block": ((0, 2), (0, 2)),
    "GradNormLoRP": ((1.4, 3), (2.8, 3)),
}


def contestants(rank: int, gap: int, refresh: str, gemm: str | None = None) -> dict:
    common = {"refresh": refresh, "gemm": gemm}
    projected = {"lr": 1e-4, "rank": rank, "update_proj_gap": gap, **common}

    def frugal(subspace):
        def make(weights):
            groups = [{"params": weights, "is_proj_params": True}]
            return FrugalAdamW(groups, lr=1e-5, subspace=subspace, update_gap=gap, **common)

        return make

    return {
        "GaLore": lambda w: GaLoreAdamW(w, **projected),
        "Fira": lambda w: FiraAdamW(w, **projected),
        "FRUGAL svd": frugal("svd"),
        "FRUGAL random": frugal("random"),
        "FRUGAL columns": frugal("columns"),
        "FRUGAL block": frugal("block"),
        "GradNormLoRP": lambda w: GradNormLoRPAdamW(w, **projected),
    }


def official(folder: Path, rank: int, gap: int) -> dict:
    """The official optimizers that are there, under the names of ours."""
    found = {}
    # FRUGAL's code imports a private function that torch no longer has.
    base = importlib.import_module("torch.optim.optimizer")
    if not hasattr(base, "_dispatch_sqrt"):
        base._dispatch_sqrt = lambda x: x**0.5

    def load(name: str, repository: str, package: str, module: str):
        home = folder / repository / package
        if not home.is_dir():
            return None
        shell = types.ModuleType(name)
        shell.__path__ = [str(home)]
        sys.modules[name] = shell
        return importlib.import_module(f"{name}.{module}")

    keys = {"rank": rank, "update_proj_gap": gap, "proj_type": "std"}
    quiet = {"no_deprecation_warning": True}
    if (cls := official_adamw()) is not None:
        found["GaLore"] = lambda w: cls([{"params": w, "scale": 0.25, **keys}], lr=1e-4, **quiet)
    if (code := load("official_fira", "Fira", "optimizer_torch", "fira_adamw")) is not None:
        fira = code.AdamW
        found["Fira"] = lambda w: fira([{"params": w, "alpha": 0.25, **keys}], lr=1e-4, **quiet)
    if (code := load("official_frugal", "FRUGAL", "frugal", "adamw")) is not None:

        def frugal(cls, **options):
            def make(weights):
                groups = [{"params": weights, "is_proj_params": True}]
                return cls(groups, lr=1e-5, update_gap=gap, **options, **quiet)

            return make

        found["FRUGAL svd"] = frugal(code.GaloreAdamW)
        found["FRUGAL random"] = frugal(code.GaloreAdamW, proj_type="random")
        found["FRUGAL columns"] = frugal(code.CoordAdamW)
        found["FRUGAL block"] = frugal(code.BlockAdamW, block_order="descending")
    code = load("official_gnl", "GradNormLoRP", "GradNormLoRP", "LowRankWeightNormAdamW")
    if code is not None:
        norm = code.LowRankWeightNormAdamW
        found["GradNormLoRP"] = lambda w: norm(w, lr=1e-4, scale=0.25, **keys, **quiet)
    return found


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    torch.set_num_threads(1)
    weights, gradients = matrices(SHAPES, args.rounds + 1)
    gap, refresh = args.steps + 1, "svd" if args.svd else "subspace"
    makers = {
        "AdamW (foreach)": lambda w: torch.optim.AdamW(w, lr=1e-4, foreach=True),
        "T_f": lambda w: torch.optim.AdamW(w, lr=1e-4, fused=True),
        **contestants(args.rank, gap, refresh),
    }
    if args.only:
        makers = {n: m for n, m in makers.items() if n == "T_f" or n in args.only}
    if args.official is not None:
        theirs = official(args.official, args.rank, gap)
        makers.update({f"official {n}": m for n, m in theirs.items() if n in makers})
    if args.bfloat16:
        for name, make in contestants(args.rank, gap, refresh, "bfloat16").items():
            if name in makers and BARS[name][0][0]:  # there are products
                makers[f"bfloat16 {name}"] = make
    made = {}
    for name, make in makers.items():
        own = [torch.nn.Parameter(w.detach().clone()) for w in weights]
        made[name] = (own, make(own))
    products = bare_products(weights, gradients[0], args.rank)
    times: dict[str, dict[str, list[float]]] = {n: {"normal": [], "refresh": []} for n in made}
    unit = []
    for turn, grads in enumerate(gradients):
        refresh = {}
        for name, (own, optimizer) in made.items():
            for weight, grad in zip(own, grads, strict=True):
                weight.grad = grad
            refresh[name] = milliseconds(optimizer.step)
        normal: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(args.steps):
            for name, (_, optimizer) in made.items():
                normal[name].append(milliseconds(optimizer.step))
            unit.append(milliseconds(products))
        if turn:  # the first round allocates, and has no old basis to start from
            for name in made:
                times[name]["refresh"].append(refresh[name])
                times[name]["normal"] += normal[name]
    found = {n: {k: statistics.median(v) for k, v in t.items()} for n, t in times.items()}
    found["T_g"] = {"normal": statistics.median(unit[args.steps :])}
    return found


def in_processes(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median over processes of every figure."""
    if args.processes == 1:
        return measure(args)
    command = [sys.executable, __file__, *sys.argv[1:], "--processes", "1", "--json"]
    runs = []
    for _ in range(args.processes):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {
        name: {key: statistics.median(run[name][key] for run in runs) for key in figures}
        for name, figures in runs[0].items()
    }


def rows(found: dict[str, dict[str, float]], bfloat16: bool) -> list[list]:
    g, f = found["T_g"]["normal"], found["T_f"]["normal"]
    table = []
    for name, (normal, refresh) in BARS.items():
        if name not in found:
            continue
        ours = found[name]
        bars = [a * g + b * f for a, b in (normal, refresh)]
        amortised = (ours["refresh"] + (GAP - 1) * ours["normal"]) / GAP
        theirs, rounded = found.get(f"official {name}"), found.get(f"bfloat16 {name}")
        ratio = None
        if theirs is not None:
            ratio = amortised / ((theirs["refresh"] + (GAP - 1) * theirs["normal"]) / GAP)
        row = [
            name,
            ours["normal"],
            (ours["normal"] - normal[1] * f) / g if normal[0] else None,
            ours["normal"] / bars[0],
            ours["refresh"],
            (ours["refresh"] - refresh[1] * f) / g if refresh[0] else None,
            ours["refresh"] / bars[1],
            amortised,
            ratio,
        ]
        if bfloat16:
            row += [None, None]
            if rounded is not None:
                row[-2:] = rounded["normal"], rounded["normal"] / ours["normal"]
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="normal steps a round")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--svd", action="store_true", help="refresh by SVD")
    parser.add_argument("--bfloat16", action="store_true", help="with matrix products in it, too")
    parser.add_argument("--official", type=Path, help="folder of the official checkouts")
    parser.add_argument("--only", nargs="*", help="names of the rows wanted")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    found = in_processes(args)
    if args.json:
        print(json.dumps(found))
        return
    units = ", ".join(
        f"{n} {found[n]['normal']:.1f} ms" for n in ("T_g", "T_f", "AdamW (foreach)") if n in found
    )
    milli = dict.fromkeys(
        ["normal, ms", "refresh, ms", "amortised, ms", "normal, bfloat16, ms"], ".1f"
    )
    ratio = dict.fromkeys(
        ["/ bar", "refresh / bar", "(- T_f) / T_g", "refresh (- T_f) / T_g", "/ float32"], ".2f"
    )
    columns = [
        "optimizer",
        "normal, ms",
        "(- T_f) / T_g",
        "/ bar",
        "refresh, ms",
        "refresh (- T_f) / T_g",
        "refresh / bar",
        "amortised, ms",
        "/ official",
    ]
    if args.bfloat16:
        columns += ["normal, bfloat16, ms", "/ float32"]
    title = f"21 matrices, 9.49 M parameters, float32, rank {args.rank}, one thread; {units}"
    formats = {**milli, **ratio, "/ official": ".2f"}
    formats = {name: formats[name] for name in columns if name in formats}
    print(Table(columns, rows(found, args.bfloat16), title=title, formats=formats).markdown())


if __name__ == "__main__":
    main()
