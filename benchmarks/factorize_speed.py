"""Seconds to shrink: `factorize` against a full SVD of every matrix, and LoRD on an encoder.

    python benchmarks/factorize_speed.py --threads 1
    python benchmarks/factorize_speed.py --only lord --threads 2

Factorize: a model of GPT-2-small's shapes (48 matrices of 768 x 768 to 3072 x 768; ``--layers`` for
fewer blocks), random weights or planted decaying spectra, at a share of the break-even rank and at
half of the narrower side. Both sides take turns; medians of process time, and, as a ratio, the
Frobenius error to the least one (the worst matrix). LoRD: the embedded encoder, 256 documents,
half of its linear parameters; wall time, statistics and factors together.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from functools import partial

import torch
from torch import Tensor, nn

from fullrank.compress import (
    Fixed,
    FractionOfBreakEven,
    RankPlan,
    factorize,
    make_plan,
    matricise,
)
from fullrank.compress.targets import factorisable
from fullrank.core import Table

SPECTRA = {
    "random": None,
    "i^-0.5": lambda i: i**-0.5,
    "i^-1": lambda i: 1 / i,
    "exp(-i / 50)": lambda i: torch.exp(-i / 50),
}


def gpt2(layers: int) -> nn.Module:
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    return GPT2Model(GPT2Config(n_layer=layers)).eval()


@torch.no_grad()
def plant(model: nn.Module, spectrum) -> None:
    """Give every weight matrix these singular values, between random bases."""
    generator = torch.Generator().manual_seed(0)
    for module in factorisable(model).values():
        found = matricise(module)
        m, n = found.shape
        k = min(m, n)
        sizes = spectrum(torch.arange(1, k + 1, dtype=torch.float64))
        U, V = (
            torch.linalg.qr(torch.randn(side, k, generator=generator, dtype=torch.float64)).Q
            for side in (m, n)
        )
        module.weight.copy_(found.fold((U * sizes) @ V.T))


def full_svds(matrices: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [torch.linalg.svd(W.to(dtype), full_matrices=False)[1] for W in matrices]


def seconds(run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def worst_error(small: nn.Module, matrices: dict[str, Tensor], spectra: dict[str, Tensor]) -> float:
    """Frobenius error over the least one of that rank, of the worst matrix."""
    modules = dict(small.named_modules())
    found = []
    for name, W in matrices.items():
        layer = modules[name]
        product = layer.second.double() @ layer.first.double()
        least = spectra[name][layer.rank :].square().sum().sqrt()
        found.append(float((W.double() - product).norm() / least))
    return max(found)


@torch.no_grad()
def factorize_table(layers: int, rounds: int) -> Table:
    rows = []
    for kind, spectrum in SPECTRA.items():
        model = gpt2(layers)
        if spectrum is not None:
            plant(model, spectrum)
        matrices = {n: matricise(m).matrix for n, m in factorisable(model).items()}
        double = full_svds(list(matrices.values()), torch.float64)
        spectra = dict(zip(matrices, double, strict=True))
        for label, rule in (("half of break-even", FractionOfBreakEven(0.5)), ("383", Fixed(383))):
            rows.append([kind, label, *race(model, make_plan(model, rule), spectra, rounds)])
    columns = ["spectrum", "rank", "factorize, s", "SVDs, s", "SVDs / factorize"]
    title = f"GPT-2-small's shapes, {layers} of 12 blocks, {torch.get_num_threads()} threads"
    return Table(
        [*columns, "float64 SVDs / factorize", "error / least"],
        rows,
        title=title,
        formats=dict.fromkeys([*columns[2:], "float64 SVDs / factorize"], ".2f")
        | {"error / least": ".4f"},
    )


def race(model: nn.Module, plan: RankPlan, spectra: dict[str, Tensor], rounds: int) -> list[float]:
    """Medians of both sides, their ratios, and the worst error."""
    matrices = {n: matricise(m).matrix for n, m in factorisable(model).items()}
    all_of_them = list(matrices.values())
    times: list[list[float]] = []
    for _ in range(rounds):
        small = copy.deepcopy(model)
        times.append(
            [
                seconds(partial(factorize, small, plan)),
                seconds(partial(full_svds, all_of_them, torch.float32)),
                seconds(partial(full_svds, all_of_them, torch.float64)),
            ]
        )
    ours, single, wide = (statistics.median(column) for column in zip(*times, strict=True))
    return [ours, single, single / ours, wide / ours, worst_error(small, matrices, spectra)]


def lord_table(texts: int, rounds: int) -> Table:
    from fullrank.compress import LoRDConfig, lord_compress
    from fullrank.core.models import DEFAULT_ENCODER, load_sentence_transformer
    from fullrank.datasets import pydocs

    documents = list(pydocs().corpus.contents)[:texts]
    rows = []
    for _ in range(rounds):
        encoder = load_sentence_transformer(DEFAULT_ENCODER)
        start = time.perf_counter()
        _, table = lord_compress(encoder, documents, LoRDConfig(budget=0.5), progress=False)
        rows.append([texts, len(table.rows), time.perf_counter() - start])
    title = f"LoRD, embedded encoder, {torch.get_num_threads()} threads"
    return Table(["texts", "layers", "seconds"], rows, title=title, formats={"seconds": ".1f"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--only", choices=("factorize", "lord"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only in (None, "factorize"):
        print(factorize_table(options.layers, options.rounds).markdown(), end="\n\n")
    if options.only in (None, "lord"):
        print(lord_table(options.texts, options.rounds).markdown())


if __name__ == "__main__":
    main()
