"""LIFT: the step's CPU time beside the official code's, and the paper's claims in small.

    git clone https://github.com/zihanghliu/LIFT
    python benchmarks/lift.py --official LIFT/src/sparseAdam.py
    FULLRANK_DATA=... python benchmarks/lift.py --seeds 3

Speed: one process, one thread, 21 matrices of 512 to 1376, float32, CPU time, in turns. The
official optimizer is read from a file; its CUDA device is replaced by the CPU, and it gets a mask
type with the word that makes it choose the largest entries, as the paper does. Without the file
its rows are missing.

Spectral norms: noise of one size on the entries that LIFT, magnitude and chance choose. Encoder:
such noise on all-MiniLM-L6-v2, and what is left of its embeddings. Language model (with
FULLRANK_DATA): a small byte model trained on WikiText-2, then fine-tuned on GSM8K's text with as
many trained entries for each choice: loss on the target, and on the text it came from.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
import types
import warnings
from pathlib import Path

import torch
from tiny_lm import bits_per_byte, clone, data_folder, gsm8k, pretrained, train, wikitext
from torch import nn

from fullrank.core import Table
from fullrank.optim import state_bytes
from fullrank.optim.lift import LIFT
from fullrank.optim.mask import budget, leading_indices, principal_mask
from fullrank.optim.memory import human_bytes

SHAPES = [(512, 512)] * 12 + [(1376, 512)] * 6 + [(512, 1376)] * 3
PERIODS = (200, 400)


# -- speed -----------------------------------------------------------------------------------


def official_class(path: str):
    """The official optimizer, on the CPU."""
    source = Path(path).read_text().replace('torch.device("cuda")', 'torch.device("cpu")')
    module = types.ModuleType("official_lift")
    exec(compile(source, path, "exec"), module.__dict__)
    return module.SparseAdamW


def milliseconds(work) -> float:
    began = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        work()
    return 1e3 * (time.process_time() - began)


def speed(official: str | None, rank: int, rounds: int, normal: int) -> Table:
    generator = torch.Generator().manual_seed(0)
    start = [0.02 * torch.randn(shape, generator=generator) for shape in SHAPES]
    gradients = [1e-3 * torch.randn(shape, generator=generator) for shape in SHAPES]
    period = normal + 1
    common = {"lr": 1e-4, "betas": (0.9, 0.95)}
    makers = {
        "AdamW (foreach)": lambda w: torch.optim.AdamW(w, foreach=True, **common),
        "AdamW (fused)": lambda w: torch.optim.AdamW(w, fused=True, **common),
        "fullrank": lambda w: LIFT(w, rank=rank, lra_rank=rank, update_interval=period, **common),
    }
    if official:
        group = {"rank": rank, "filter_rank": rank, "update_proj_gap": period}
        kind = official_class(official)
        makers["official LIFT"] = lambda w: kind(
            [{"params": w, **group}],
            no_deprecation_warning=True,
            mask_type="lift_sparse_largest",
            **common,
        )
    made = {}
    for name, make in makers.items():
        weights = [nn.Parameter(weight.clone()) for weight in start]
        with contextlib.redirect_stdout(io.StringIO()):
            made[name] = (weights, make(weights))
    times: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds * period + 1):
        for name, (weights, optimizer) in made.items():
            for weight, gradient in zip(weights, gradients, strict=True):
                # The official step writes its update into the gradient.
                weight.grad = gradient.clone()
            times[name].append(milliseconds(optimizer.step))
    rows = []
    for name, (weights, optimizer) in made.items():
        each = times[name][1:]
        usual = statistics.median(each)
        # The official code chooses at the end of the step before; either way once a period.
        extra = statistics.fmean(sorted(each)[-rounds:]) - usual
        lifts = "AdamW" not in name
        amortised = [usual + extra / gap if lifts else usual for gap in PERIODS]
        moved = sum(int((w != s).sum()) for w, s in zip(weights, start, strict=True))
        state = state_bytes(optimizer) if name == "fullrank" or not lifts else None
        rows.append([name, usual, extra if lifts else None, *amortised, moved, state])
    columns = ["optimizer", "step, ms", "choice, ms", *(f"over {gap}, ms" for gap in PERIODS)]
    share = sum(budget(s, rank) for s in SHAPES) / sum(m * n for m, n in SHAPES)
    return Table(
        [*columns, "entries moved", "state"],
        rows,
        title=f"{len(SHAPES)} matrices, float32, rank {rank} ({share:.1%} of the entries), one "
        "thread, CPU time",
        formats={
            **dict.fromkeys(columns[1:], ".1f"),
            "entries moved": ",d",
            "state": human_bytes,
        },
    )


# -- which entries matter --------------------------------------------------------------------


def choose(weight: torch.Tensor, how: str, rank: int, lra_rank: int, generator) -> torch.Tensor:
    """A mask with as many entries for every choice."""
    if how in ("LIFT", "smallest"):
        return principal_mask(weight, rank, min(lra_rank, *weight.shape), largest=how == "LIFT")
    score = weight.abs() if how == "magnitude" else torch.rand(weight.shape, generator=generator)
    mask = torch.zeros(weight.numel(), dtype=torch.bool)
    mask[leading_indices(score.flatten(), budget(weight.shape, rank))] = True
    return mask.view(weight.shape)


def spectral_norms(seeds: int) -> Table:
    rows = []
    for side in (256, 512):
        found: dict[str, list[float]] = {}
        # Five in a hundred entries, filtered at the rank that has as many parameters.
        rank = max(round(0.05 * side / 2), 1)
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            W = torch.randn(side, side, generator=generator)
            noise = torch.randn(side, side, generator=generator)
            found.setdefault("before", []).append(float(torch.linalg.matrix_norm(W, 2)))
            for how in ("LIFT", "magnitude", "random"):
                mask = choose(W, how, rank, rank, generator)
                # The same Frobenius norm for every choice.
                moved = noise.masked_fill(~mask, 0.0)
                moved = moved * (int(mask.sum()) ** 0.5 / moved.norm())
                norm = torch.linalg.matrix_norm(W + moved, 2)
                found.setdefault(how, []).append(float(norm))
        rows.append([side, rank, *(statistics.fmean(each) for each in found.values())])
    names = ["before", "LIFT", "magnitude", "random"]
    return Table(
        ["side", "rank", *names],
        rows,
        title=f"spectral norm of a Gaussian matrix after N(0, 1) noise on 5 % of its entries, "
        f"{seeds} seed(s)",
        formats=dict.fromkeys(names, ".2f"),
    )


def encoder(seeds: int, size: float = 0.1) -> Table:
    from sentence_transformers import SentenceTransformer

    from fullrank.core.models import DEFAULT_ENCODER, resolve_model

    model = SentenceTransformer(resolve_model(DEFAULT_ENCODER), device="cpu")
    texts = [f"a sentence about {topic}" for topic in TOPICS.split()]
    clean = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "encoder" in n]
    start = [layer.weight.detach().clone() for layer in layers]
    rows = []
    for how in ("LIFT", "magnitude", "random"):
        found = []
        for seed in range(seeds):
            generator = torch.Generator().manual_seed(seed)
            for layer, weight in zip(layers, start, strict=True):
                side = min(weight.shape)
                rank = max(round(0.05 * weight.numel() / sum(weight.shape)), 1)
                mask = choose(weight, how, rank, min(rank, side), generator)
                noise = size * torch.randn(weight.shape, generator=generator)
                layer.weight.data.copy_(weight + noise * mask)
            noisy = model.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
            found.append(float((noisy * clean).sum(1).mean()))
        spread = statistics.stdev(found) if seeds > 1 else None
        rows.append([how, statistics.fmean(found), spread])
    return Table(
        ["noise on", "cosine", "spread"],
        rows,
        title=f"all-MiniLM-L6-v2 with N(0, {size}^2) noise on 5 % of each linear weight: mean "
        f"cosine to its clean embeddings, {seeds} seed(s)",
        formats=dict.fromkeys(["cosine", "spread"], ".3f"),
    )


TOPICS = (
    "rivers trains bread violins volcanoes chess neurons glaciers taxes lighthouses poems "
    "asteroids bees castles democracy enzymes forests guitars horses islands jazz kites lemons "
    "markets novels oceans planets quilts robots sculptures theatres umbrellas vaccines whales"
)


# -- a language model ------------------------------------------------------------------------


class FixedMask(LIFT):
    """The same optimizer on entries that something else has chosen, once."""

    def __init__(self, params, how: str, generator, **options):
        self.how, self.generator = how, generator
        super().__init__(params, **options)

    def _fit(self, mask, param, weight, step):
        if self.how == "LIFT":
            return super()._fit(mask, param, weight, step)
        chosen = choose(weight.detach(), self.how, mask.rank, mask.lra_rank, self.generator)
        return mask.inject([chosen], weight)


def language_model(folder: Path, seeds: int, pre: int, steps: int, width: int, rank: int) -> Table:
    base = pretrained(folder, width, 2, pre)
    source = wikitext(folder)[1]
    data, target = gsm8k(folder)
    rates = [1e-3, 3e-3, 1e-2, 3e-2]

    def once(how, lr, seed):
        model = clone(base)
        layers = [p for block in model.blocks for p in block.parameters() if p.dim() == 2]
        generator = torch.Generator().manual_seed(seed)
        if how == "full":
            optimizer = torch.optim.AdamW(layers, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        else:
            interval = max(steps // 6, 1) if how == "LIFT" else 10**9
            optimizer = FixedMask(
                layers, how, generator, lr=lr, rank=rank, lra_rank=rank, update_interval=interval
            )
        before = [p.detach().clone() for p in layers]
        train(model, optimizer, data, steps, seed + 1)
        ranks = [
            int(torch.linalg.matrix_rank(p.detach() - b, rtol=1e-4))
            for p, b in zip(layers, before, strict=True)
        ]
        scores = bits_per_byte(model, target), bits_per_byte(model, source)
        return (*scores, statistics.fmean(ranks))

    rows = []
    for how in ("full", "LIFT", "magnitude", "random", "smallest"):
        first = {lr: once(how, lr, 0) for lr in rates}
        best = min(first, key=lambda lr: first[lr][0])
        found = [first[best]] + [once(how, best, seed) for seed in range(1, seeds)]
        means = [statistics.fmean(each) for each in zip(*found, strict=True)]
        spread = statistics.stdev([each[0] for each in found]) if seeds > 1 else None
        rows.append([how, best, means[0], spread, means[1], means[2]])
    names = ["target", "spread", "source"]
    return Table(
        ["trained", "best lr", *names, "rank of the change"],
        rows,
        title=f"bits per byte; width {width}, {pre} steps on WikiText-2, then {steps} on GSM8K, "
        f"as many entries as LoRA of rank {rank}, {seeds} seed(s); before: target "
        f"{bits_per_byte(base, target):.3f}, source {bits_per_byte(base, source):.3f}",
        formats={**dict.fromkeys(names, ".4f"), "rank of the change": ".1f"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", help="the official sparseAdam.py (see above)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 128])
    parser.add_argument("--rounds", type=int, default=3, help="choices of masks timed")
    parser.add_argument("--normal", type=int, default=10, help="steps between them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pretrain", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--lm-rank", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["speed", "norms", "encoder", "lm"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    if args.only in (None, "speed"):
        if args.official is None:
            print("no --official file: its rows are missing.", file=sys.stderr)
        for rank in args.ranks:
            print(speed(args.official, rank, args.rounds, args.normal).markdown(), end="\n\n")
    if args.only in (None, "norms"):
        print(spectral_norms(args.seeds).markdown(), end="\n\n")
    if args.only in (None, "encoder"):
        print(encoder(args.seeds).markdown(), end="\n\n")
    if args.only in (None, "lm"):
        if (folder := data_folder()) is None:
            print("FULLRANK_DATA is not set: no language model.", file=sys.stderr)
            return
        table = language_model(
            folder, args.seeds, args.pretrain, args.steps, args.width, args.lm_rank
        )
        print(table.markdown())


if __name__ == "__main__":
    main()
