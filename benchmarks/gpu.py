"""On a GPU: a step of each subspace optimizer beside torch's, memory, spectra, factorisation.

    python benchmarks/gpu.py                       # all of it: about three minutes on an H100
    python benchmarks/gpu.py steps --official FOLDER

``steps``: the weight matrices of a Llama of 350 million parameters (24 blocks of width 1024),
bfloat16 or float32, rank 256. All contestants step the same weights with the same gradients, in
turns; medians of milliseconds by the device's clock. A refresh is a step of its own. FOLDER holds
checkouts of the official repositories as in ``optimizers_step.py``.
``memory``: most bytes that a training step of that model allocates (one sequence of 256 tokens,
bfloat16), and what its state takes.
``spectra``: singular values of matrices, one after the other: the Gram matrix against
``torch.linalg.svdvals`` on the device. ``factorize``: leading factors against a full SVD.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from optimizers_step import contestants, official

from fullrank.core import Table
from fullrank.linalg import gram_spectrum
from fullrank.linalg.gram_svd import gram_svd
from fullrank.optim import GaLoreAdamW, param_groups, state_bytes, step_per_layer

WIDTH, INNER, BLOCKS, RANK, GAP = 1024, 2736, 24, 256, 200
BLOCK = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)]


def timed(work) -> float:
    """Milliseconds of the device, from an idle one to an idle one."""
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def gradient(shape, generator, dtype) -> torch.Tensor:
    """Of a spectrum that falls by a power, as gradients' do."""
    m, n = shape
    k = min(m, n)
    sigma = torch.arange(1, k + 1, device="cuda") ** -1.0
    U, V = (torch.randn(size, k, generator=generator, device="cuda") / size**0.5 for size in (m, n))
    return ((U * sigma) @ V.t()).to(dtype)


def product_pair(weights, grads, rank):
    """What no projected step can do without: into the subspace, and out of it."""
    jobs = []
    for weight, grad in zip(weights, grads, strict=True):
        tall = weight.shape[0] >= weight.shape[1]
        basis = torch.linalg.qr(torch.randn(min(weight.shape), rank, device="cuda"))[0]
        jobs.append((grad if tall else grad.t(), basis.to(grad.dtype)))

    def work():
        for grad, basis in jobs:
            (grad @ basis) @ basis.t()

    return work


def steps(args: argparse.Namespace) -> None:
    shapes = BLOCK * args.blocks
    for dtype in (getattr(torch, name) for name in args.dtype):
        generator = torch.Generator("cuda").manual_seed(0)
        grads = [gradient(shape, generator, dtype) for shape in shapes]
        weights = [0.02 * torch.randn(s, generator=generator, device="cuda") for s in shapes]
        gap = args.steps + 1
        makers = {
            "AdamW (foreach)": lambda w: torch.optim.AdamW(w, lr=1e-4, foreach=True),
            "AdamW (fused)": lambda w: torch.optim.AdamW(w, lr=1e-4, fused=True),
            **contestants(RANK, gap, "subspace"),
        }
        if args.official is not None:
            theirs = official(args.official, RANK, gap)
            makers.update({f"official {n}": m for n, m in theirs.items() if n in makers})
        made, rows = {}, []
        for name, make in makers.items():
            own = [torch.nn.Parameter(w.to(dtype)) for w in weights]
            for weight, grad in zip(own, grads, strict=True):
                weight.grad = grad
            made[name] = make(own)
        found: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in made}
        for turn in range(args.rounds + 1):
            for name, optimizer in made.items():
                refresh = timed(optimizer.step)
                if name.startswith("official") and turn > 1:
                    continue  # a refresh of these takes many seconds: two rounds do
                normal = [timed(optimizer.step) for _ in range(args.steps)]
                if turn:
                    found[name][0].extend(normal)
                    found[name][1].append(refresh)
        units = {name: statistics.median(normal) for name, (normal, _) in found.items()}
        product = product_pair(weights, grads, RANK)
        bare = statistics.median(timed(product) for _ in range(10))
        for name, (_, refresh) in found.items():
            normal, full = units[name], statistics.median(refresh)
            amortised = (full + (GAP - 1) * normal) / GAP
            state = state_bytes(made[name]) / 2**20 if name in makers else None
            row = [name, normal, full, amortised, amortised / units["AdamW (fused)"], state]
            other = found.get(f"official {name}")
            ratio = None
            if other is not None:
                theirs_full = statistics.median(other[1])
                ratio = amortised / ((theirs_full + (GAP - 1) * statistics.median(other[0])) / GAP)
            rows.append([*row, ratio])
        size = sum(m * n for m, n in shapes) / 1e6
        title = f"{len(shapes)} matrices, {size:.0f} M parameters, {dtype}, rank {RANK}; "
        title += f"two products a matrix: {bare:.1f} ms"
        columns = [
            "optimizer",
            "normal, ms",
            "refresh, ms",
            "amortised, ms",
            "/ AdamW (fused)",
            "state, MiB",
            "/ official",
        ]
        formats = dict.fromkeys(columns[1:4], ".2f") | {
            "/ AdamW (fused)": ".2f",
            "state, MiB": ".0f",
            "/ official": ".2f",
        }
        print(Table(columns, rows, title=title, formats=formats).markdown(), "\n", flush=True)
        del made, weights, grads
        torch.cuda.empty_cache()


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=16,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).to("cuda", torch.bfloat16)


def training(make, by_layer: bool) -> tuple[float, float, float]:
    """MiB of the optimizer's state, MiB at the peak, and milliseconds of a whole step."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    model = llama()
    optimizer = make(model)
    if by_layer:
        step_per_layer(optimizer)
    ids = torch.randint(0, 32000, (1, 256), device="cuda")

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        if not by_layer:
            optimizer.step()
            optimizer.zero_grad()

    for _ in range(4):  # the first ones allocate
        step()
    torch.cuda.reset_peak_memory_stats()
    times = [timed(step) for _ in range(6)]
    peak = torch.cuda.max_memory_allocated()
    return state_bytes(optimizer) / 2**20, peak / 2**20, statistics.median(times)


def memory(args: argparse.Namespace) -> None:
    def galore(model, **options):
        group = {"rank": RANK, "update_proj_gap": 3, "refresh": "subspace", "verbose": False}
        return GaLoreAdamW(param_groups(model, GaLoreAdamW, **group), lr=1e-4, **options)

    contests = {
        "AdamW (fused)": (lambda m: torch.optim.AdamW(m.parameters(), fused=True), False),
        "GaLoreAdamW": (galore, False),
        "GaLoreAdamW, by layer": (galore, True),
        "GaLoreAdamW, 8 bits, by layer": (partial(galore, state_bits=8), True),
    }
    rows = [[name, *training(make, by_layer)] for name, (make, by_layer) in contests.items()]
    print(
        Table(
            ["optimizer", "state, MiB", "peak, MiB", "step, ms"],
            rows,
            title="Training a Llama of 368 M parameters, bfloat16, one sequence of 256 tokens",
            formats={"state, MiB": ".0f", "peak, MiB": ".0f", "step, ms": ".1f"},
        ).markdown(),
        "\n",
        flush=True,
    )


def compare(title, ours, theirs, shapes, rounds=3) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    rows = []
    for shape in shapes:
        A = gradient(shape, generator, torch.float32)
        times: tuple[list[float], list[float]] = ([], [])
        for turn in range(rounds + 1):
            for work, found in zip((ours, theirs), times, strict=True):
                took = timed(lambda A=A, work=work: work(A))
                if turn:
                    found.append(took)
        a, b = map(statistics.median, times)
        rows.append([f"{shape[0]} x {shape[1]}", a, b, b / a])
    columns = ["matrix", "fullrank, ms", "torch, ms", "ratio"]
    formats = {"fullrank, ms": ".1f", "torch, ms": ".1f", "ratio": ".1f"}
    print(Table(columns, rows, title=title, formats=formats).markdown(), "\n", flush=True)


BIG = [(1024, 1024), (2736, 1024), (4096, 4096), (11008, 4096)]


def spectra(args: argparse.Namespace) -> None:
    title = "All singular values: gram_spectrum (float64) against torch.linalg.svdvals (float32)"
    compare(title, gram_spectrum, torch.linalg.svdvals, BIG)


def factors(args: argparse.Namespace) -> None:
    title = "Leading 256 factors: gram_svd, which shrinking uses, against torch.linalg.svd"
    full = partial(torch.linalg.svd, full_matrices=False)
    compare(title, lambda A: gram_svd(A, RANK), full, BIG)


PARTS = {"steps": steps, "memory": memory, "spectra": spectra, "factorize": factors}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="normal steps a round")
    parser.add_argument("--blocks", type=int, default=BLOCKS, help="of the model, for steps")
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"], help="for steps")
    parser.add_argument("--official", type=Path, help="folder of the official checkouts")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "no GPU on this machine\n")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    for name in args.parts or PARTS:
        began = time.perf_counter()
        PARTS[name](args)
        print(f"<!-- {name}: {time.perf_counter() - began:.0f} s -->\n", flush=True)


if __name__ == "__main__":
    main()
