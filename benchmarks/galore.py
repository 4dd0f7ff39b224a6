"""GaLoreAdamW's step beside the official package's and AdamW's: CPU time, state, peak memory.

    python benchmarks/galore.py

The official code is the package galore-torch (its AdamW needs torch and transformers only):

    pip install --no-deps galore-torch

Without it, the rows of the official code are left out. All contestants step the same matrices
with the same gradients in one process, in turns, on one thread; each figure is the median over
rounds of the process's CPU time. A round is one refresh and some normal steps; "amortised" is
over a period of 200 steps. Gradients have a power-law spectrum and turn a little between rounds.
Peak memory is that of a process of its own for each contestant.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import statistics
import sys
import time
import types

import torch
from own_process import in_own_process, memory_status, reset_peak

from fullrank.core import Table
from fullrank.optim import GaLoreAdamW, state_bytes
from fullrank.optim.memory import human_bytes

# Twelve attention matrices and nine of the MLP: 9.49 million parameters.
SHAPES = [(512, 512)] * 12 + [(1376, 512)] * 6 + [(512, 1376)] * 3
GAP = 200


def official_adamw():
    """The official AdamW, without the package's import of its bitsandbytes form; None if absent."""
    if "galore_torch" in sys.modules:
        return importlib.import_module("galore_torch.adamw").AdamW
    spec = importlib.util.find_spec("galore_torch")
    if spec is None or importlib.util.find_spec("transformers") is None:
        return None
    package = types.ModuleType("galore_torch")
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules["galore_torch"] = package
    return importlib.import_module("galore_torch.adamw").AdamW


def contestants(rank: int, period: int) -> dict:
    """Name -> function from weights to an optimizer that refreshes every ``period`` steps."""
    galore = {"rank": rank, "update_proj_gap": period, "scale": 0.25}

    def ours(**options):
        return lambda weights: GaLoreAdamW(weights, lr=1e-4, **galore, **options)

    found = {
        "AdamW (foreach)": lambda w: torch.optim.AdamW(w, lr=1e-4, foreach=True),
        "AdamW (fused)": lambda w: torch.optim.AdamW(w, lr=1e-4, fused=True),
    }
    if (official := official_adamw()) is not None:
        found["official GaLore"] = lambda w: official(
            [{"params": w, "proj_type": "std", **galore}], lr=1e-4, no_deprecation_warning=True
        )
    found["fullrank, svd"] = ours()
    found["fullrank, subspace"] = ours(refresh="subspace")
    found["fullrank, subspace, 8 bits"] = ours(refresh="subspace", state_bits=8)
    return found


def matrices(shapes, turns: int, seed: int = 0):
    """Weights, and for every round one gradient a weight."""
    generator = torch.Generator().manual_seed(seed)

    def orthonormal(rows, columns):
        return torch.linalg.qr(torch.randn(rows, columns, generator=generator))[0]

    weights = [torch.nn.Parameter(0.02 * torch.randn(s, generator=generator)) for s in shapes]
    rounds: list[list[torch.Tensor]] = [[] for _ in range(turns)]
    for m, n in shapes:
        k = min(m, n)
        U, V = orthonormal(m, k), orthonormal(n, k)
        sigma = torch.arange(1, k + 1).float() ** -1.0
        for gradients in rounds:
            gradients.append((U * sigma) @ V.t())
            U = torch.linalg.qr(U + 0.002 / m**0.5 * torch.randn(m, k, generator=generator))[0]
            V = torch.linalg.qr(V + 0.002 / n**0.5 * torch.randn(n, k, generator=generator))[0]
    return weights, rounds


def official_bases(optimizer) -> int:
    """Bytes of the official projectors, which are objects beside the tensors of the state."""
    projectors = (s["projector"] for s in optimizer.state.values() if "projector" in s)
    # A basis is a slice: it keeps the whole singular factor alive.
    return sum(p.ortho_matrix.untyped_storage().nbytes() for p in projectors)


def milliseconds(work) -> float:
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began)


def bare_products(weights, gradients, rank):
    """The two GEMMs a matrix that no projected step can do without."""
    jobs = []
    for gradient in gradients:
        m, n = gradient.shape
        basis = torch.linalg.qr(torch.randn(min(m, n), rank))[0]
        small = torch.empty((m, rank) if m >= n else (rank, n))
        jobs.append((gradient, basis, small, torch.empty_like(gradient)))

    def work():
        for gradient, basis, small, out in jobs:
            if gradient.shape[0] >= gradient.shape[1]:
                torch.mm(gradient, basis, out=small)
                torch.mm(small, basis.t(), out=out)
            else:
                torch.mm(basis.t(), gradient, out=small)
                torch.mm(basis, small, out=out)

    return work


def measure(rank: int, shapes, rounds: int, normal: int) -> dict[str, dict]:
    weights, gradients = matrices(shapes, rounds + 1)
    made = {}
    for name, make in contestants(rank, normal + 1).items():
        own = [torch.nn.Parameter(w.detach().clone()) for w in weights]
        made[name] = (own, make(own))
    products = bare_products(weights, gradients[0], rank)
    times = {name: {"normal": [], "refresh": []} for name in [*made, "products"]}
    for turn, grads in enumerate(gradients):
        for name, (own, optimizer) in made.items():
            for weight, grad in zip(own, grads, strict=True):
                weight.grad = grad
            refresh = milliseconds(optimizer.step)
            steps = [milliseconds(optimizer.step) for _ in range(normal)]
            if turn:  # the first round allocates, and has no old basis to start from
                times[name]["refresh"].append(refresh)
                times[name]["normal"].append(statistics.median(steps))
        products()
        if turn:
            times["products"]["normal"].append(milliseconds(products))
    result = {}
    for name, (_, optimizer) in made.items():
        result[name] = {k: statistics.median(v) for k, v in times[name].items()}
        result[name]["state"] = state_bytes(optimizer) + official_bases(optimizer)
        result[name]["refreshes"] = getattr(optimizer, "refreshes", None)
    result["products"] = {"normal": statistics.median(times["products"]["normal"])}
    return result


def peak_memory(name: str, rank: int, shapes) -> int:
    """Bytes that three steps of one contestant add to the process at their peak."""
    torch.set_num_threads(1)
    weights, gradients = matrices(shapes, 1)
    for weight, grad in zip(weights, gradients[0], strict=True):
        weight.grad = grad
    optimizer = contestants(rank, 2)[name](weights)
    reset_peak()
    before = memory_status("VmRSS")
    for _ in range(3):
        optimizer.step()
    return memory_status("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="normal steps a round")
    parser.add_argument("--copies", type=int, default=1, help="of the set of 21 matrices")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    shapes = SHAPES * args.copies
    if official_adamw() is None:
        print("galore-torch is not installed: its rows are missing.", file=sys.stderr)
        print("    pip install --no-deps galore-torch transformers", file=sys.stderr)

    on_linux = sys.platform.startswith("linux")
    found = measure(args.rank, shapes, args.rounds, args.steps)
    products = found.pop("products")["normal"]
    amortised = {name: (f["refresh"] + (GAP - 1) * f["normal"]) / GAP for name, f in found.items()}
    peers = ["official GaLore", "AdamW (foreach)"]
    rows = [
        [
            name,
            f["normal"],
            f["refresh"],
            amortised[name],
            *(amortised[name] / amortised[peer] if peer in found else None for peer in peers),
            f["state"],
            in_own_process(peak_memory, name, args.rank, shapes) if on_linux else None,
        ]
        for name, f in found.items()
    ]
    count = sum(m * n for m, n in shapes)
    milli = dict.fromkeys(["normal step, ms", "refresh step, ms", "amortised, ms"], ".1f")
    ratios = dict.fromkeys([f"/ {peer}" for peer in peers], ".2f")
    sizes = dict.fromkeys(["state", "peak over start"], human_bytes)
    print(
        Table(
            ["optimizer", *milli, *ratios, *sizes],
            rows,
            title=f"{len(shapes)} matrices, {count / 1e6:.2f} M parameters, float32, rank "
            f"{args.rank}, {args.threads} thread(s), CPU time; the two bare GEMMs a matrix take "
            f"{products:.1f} ms",
            formats={**milli, **ratios, **sizes},
        ).markdown()
    )


if __name__ == "__main__":
    main()
