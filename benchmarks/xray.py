"""How fast an X-ray is: a real encoder, and matrices of known spectra in two models' sizes.

    python benchmarks/xray.py                  # 12 layers and the vocabulary table, 5 rounds
    python benchmarks/xray.py --layers 2 --rounds 1 --rows 8192 --wide 0

Prints Markdown. Ways are run in turn in every round, on the same matrices; times are medians
over rounds of the time for all matrices, wall and CPU (of all threads). Errors are against the
spectra that were planted: the largest relative error of the effective rank, the stable rank and
the nuclear norm over all matrices. `torch.linalg.svdvals` runs as a user would call it, on the
float32 matrices, with torch's own threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import cycle

import numpy as np
import torch
from torch import nn

from fullrank.core import DEFAULT_ENCODER, Table, progress, require, resolve_model
from fullrank.spectra import Spectrum, XRay, xray
from fullrank.spectra.matrix_spectrum import measures

EXPONENTS = (0.2, 0.5, 0.8, 1.0, 1.25, 1.5, 1.75, 2.0)
SHAPES = {"proj": (768, 768), "qkv": (768, 2304), "up": (768, 3072), "down": (3072, 768)}
MEASURES = ("effective rank", "stable rank", "nuclear norm")

Found = dict[str, Spectrum]


def planted(shape: tuple[int, int], exponent: float, generator: torch.Generator) -> torch.Tensor:
    """A float32 matrix with singular values ``i ** -exponent`` and random singular vectors."""
    rank = min(shape)
    left, right = (
        torch.linalg.qr(torch.randn(side, rank, generator=generator, dtype=torch.float64))[0]
        for side in shape
    )
    values = torch.arange(1, rank + 1, dtype=torch.float64) ** -exponent
    return ((left * values) @ right.T).float()


def model_of(shapes: dict[str, tuple[int, int]], seed: int) -> tuple[nn.Module, Found]:
    """A model with these matrices, and what was planted in each."""
    generator = torch.Generator().manual_seed(seed)
    model, truth = nn.Module(), {}
    with progress("plant spectra", len(shapes)) as advance:
        for (name, shape), exponent in zip(shapes.items(), cycle(EXPONENTS), strict=False):
            layer = nn.Embedding(*shape) if name == "wte" else nn.Linear(shape[1], shape[0])
            layer.weight.data = planted(shape, exponent, generator)
            model.add_module(name, layer)
            truth[name] = Spectrum(np.arange(1.0, min(shape) + 1) ** -exponent)
            advance(1)
    return model, truth


def gpt2_sized(layers: int, rows: int) -> dict[str, tuple[int, int]]:
    """GPT-2 small's matrices, as it stores them."""
    blocks = {f"{kind}_{i}": shape for i in range(layers) for kind, shape in SHAPES.items()}
    return {"wte": (rows, 768), **blocks}


def wide(width: int) -> dict[str, tuple[int, int]]:
    """One square and one tall matrix for each exponent, of a large model's proportions."""
    return {
        f"{kind}_{i}": (rows, width)
        for i in range(len(EXPONENTS))
        for kind, rows in (("square", width), ("tall", width * 11 // 4))
    }


def by_svdvals(model: nn.Module) -> Found:
    return {
        name: Spectrum(torch.linalg.svdvals(module.weight.detach()))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }


def spectra(found: XRay) -> Found:
    return {name: matrix.spectrum for name, matrix in found.items()}


def worst_error(found: Found, truth: Found, measure: str) -> float:
    attribute = measure.replace(" ", "_")
    return max(
        abs(getattr(found[name], attribute) / getattr(truth[name], attribute) - 1) for name in truth
    )


def timed(ways: dict[str, Callable[[], Found]], rounds: int) -> Iterator[tuple[str, float, float]]:
    """``(way, wall, cpu)`` of every run, all ways in turn in every round."""
    for _ in range(rounds):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            way()
            yield name, time.perf_counter() - wall, time.process_time() - cpu


def compare(ways: dict[str, Callable[[], Found]], truth: Found, rounds: int, title: str) -> Table:
    results = {name: way() for name, way in ways.items()}  # also the warm-up
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for name, wall, cpu in timed(ways, rounds):
        times[name].append((wall, cpu))
    middle = {
        name: tuple(statistics.median(column) for column in zip(*runs, strict=True))
        for name, runs in times.items()
    }
    base_wall, base_cpu = next(iter(middle.values()))
    rows = [
        [
            name,
            wall,
            base_wall / wall,
            cpu,
            base_cpu / cpu,
            *(worst_error(results[name], truth, measure) for measure in MEASURES),
        ]
        for name, (wall, cpu) in middle.items()
    ]
    columns = ["way", "wall s", "x faster", "CPU s", "x less CPU"]
    return Table(
        [*columns, *(f"error: {measure}" for measure in MEASURES)],
        rows,
        title=title,
        formats={
            "wall s": ".2f",
            "x faster": ".1f",
            "CPU s": ".2f",
            "x less CPU": ".1f",
            **{f"error: {measure}": ".1e" for measure in MEASURES},
        },
    )


def encoder_table(rounds: int) -> Table:
    model = require("transformers", extra="hf").AutoModel.from_pretrained(
        resolve_model(DEFAULT_ENCODER)
    )
    ways = {
        "torch.linalg.svdvals": lambda: by_svdvals(model),
        "xray": lambda: spectra(xray(model, show_progress=False)),
    }
    exact = {
        name: Spectrum(torch.linalg.svdvals(module.weight.detach().double()))
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }
    return compare(ways, exact, rounds, f"{DEFAULT_ENCODER}, {len(exact)} matrices")


def model_table(model: nn.Module, truth: Found, rounds: int, title: str) -> Table:
    ways = {
        "torch.linalg.svdvals": lambda: by_svdvals(model),
        "xray": lambda: spectra(xray(model, show_progress=False)),
        "xray, sampled": lambda: spectra(xray(model, accuracy="sampled", show_progress=False)),
    }
    return compare(ways, truth, rounds, f"{title}, spectra i^-p with p in {EXPONENTS}")


def margins_table(model: nn.Module, truth: Found) -> Table:
    """How far sampled measures are off, and how often the printed interval holds the truth."""
    found = xray(model, accuracy="sampled", show_progress=False)
    sampled = [matrix for matrix in found.values() if matrix.margins]
    rows = []
    for measure in ("effective rank", "stable rank", "nuclear norm", "r90", "r99"):
        right = [measures(truth[matrix.name])[measure] for matrix in sampled]
        gaps = [abs(m.measures()[measure] - r) for m, r in zip(sampled, right, strict=True)]
        errors = [gap / r for gap, r in zip(gaps, right, strict=True)]
        inside = [g <= m.margins[measure] for g, m in zip(gaps, sampled, strict=True)]
        if errors:
            rows.append([measure, max(errors), statistics.median(errors), statistics.mean(inside)])
    columns = ["measure", "largest error", "median error", "inside the interval"]
    formats = dict.fromkeys(columns[1:3], ".2%") | {columns[3]: ".0%"}
    return Table(columns, rows, title=f"Sampled, {len(sampled)} matrices", formats=formats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=50257, help="rows of the vocabulary table")
    parser.add_argument("--wide", type=int, default=2048, help="of the large matrices; 0: none")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print(encoder_table(options.rounds), "\n")
    model, truth = model_of(gpt2_sized(options.layers, options.rows), options.seed)
    title = f"GPT-2 small's sizes, {options.layers} layers and {options.rows} x 768"
    print(model_table(model, truth, options.rounds, title), "\n")
    if options.wide:
        model, truth = model_of(wide(options.wide), options.seed)
        print(model_table(model, truth, options.rounds, f"Width {options.wide}"), "\n")
        print(margins_table(model, truth))


if __name__ == "__main__":
    main()
