"""What fine-tuning brings, in which memory: GaLore against AdamW at the same number of steps.

    python benchmarks/train_encoder.py --steps 105
    python benchmarks/train_encoder.py --step-time

Each optimizer trains the embedded encoder on the train part of pydocs and keeps the weights that
are best on dev; the test queries are then ranked over the whole corpus, cut to --tokens. The
bootstrap of the differences draws whole modules. --step-time prints the CPU time of one step
instead, ours against that of sentence-transformers' own loss and defaults.
"""

from __future__ import annotations

import argparse
import statistics
import time
from contextlib import ExitStack

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

from fullrank.core import DEFAULT_ENCODER, Table, resolve_model
from fullrank.datasets import pydocs
from fullrank.evaluate import compare
from fullrank.retrieval import Dense, Encoder
from fullrank.training import EncoderTraining, MaskedRankingLoss, make_pairs, train_encoder
from fullrank.training.quiet import precision_of, training_form


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=105)
    parser.add_argument("--rank", type=int, default=None)
    parser.add_argument("--lr", type=float, default=None)
    parser.add_argument("--optimizers", nargs="+", default=["adamw", "galore_adamw"])
    parser.add_argument("--part", default="test", choices=["dev", "test"])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step-time", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    data = pydocs()
    print(data)
    print("manifest:", {k: data.manifest[k] for k in ("packages", "sha256")})
    if args.step_time:
        with ExitStack() as stack:
            print(step_times(data, args.rounds, stack))
    else:
        quality(data, args)


def quality(data, args) -> None:
    part = data.split(args.part)
    runs = {"untuned": rank(DEFAULT_ENCODER, part, args.tokens)}
    chosen = {"rank": args.rank, "lr": args.lr}
    for optimizer in args.optimizers:
        config = EncoderTraining(
            optimizer=optimizer,
            seconds=None,
            max_steps=args.steps,
            seed=args.seed,
            **{name: value for name, value in chosen.items() if value is not None},
        )
        began = time.process_time()
        trained = train_encoder(DEFAULT_ENCODER, data, config)
        print(f"\n{optimizer}: {time.process_time() - began:.0f} s of CPU time")
        print(trained.table())
        print(trained.memory.table())
        runs[optimizer] = rank(trained.model, part, args.tokens)
    metrics = ["nDCG@10", "AP", "RR", "R@100"]
    print(compare(runs, part.qrels, metrics, baseline="untuned", clusters=part.clusters).table())


def rank(model, part, tokens):
    encoder = Encoder(model, max_tokens=tokens)
    found = Dense(part.corpus, encoder, passages=False, depth=200)(part.queries)
    return found.drop(part.exclude).top(100)


def step_times(data, rounds: int, stack: ExitStack) -> Table:
    """CPU time of forward, backward and AdamW, in interleaved rounds."""
    pairs = make_pairs(data.split("train"))
    ways = {
        "sentence-transformers, float32": theirs(torch.float32),
        "sentence-transformers, bfloat16": theirs(torch.bfloat16),
        "fullrank": ours(pairs, stack),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        rows = pairs.rows[32 * number : 32 * number + 32]
        for name, step in ways.items():
            began = time.process_time()
            step(pairs, rows)
            if number:  # the first round warms up
                times[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    slowest = next(iter(medians.values()))
    return Table(
        ["way", "CPU seconds a step", "times faster"],
        [[name, value, slowest / value] for name, value in medians.items()],
        title="A step of 32 pairs with a hard negative each, 64 tokens",
        formats={"CPU seconds a step": ".2f", "times faster": ".2f"},
    )


def columns(model, pairs, rows):
    texts = pairs.corpus.contents
    parts = [[pairs.queries[r[0]] for r in rows], *([texts[r[i]] for r in rows] for i in (1, 2))]
    return [model.preprocess(part, max_length=64) for part in parts]


def theirs(dtype):
    model = SentenceTransformer(resolve_model(DEFAULT_ENCODER), device="cpu").train()
    loss = MultipleNegativesRankingLoss(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

    def step(pairs, rows):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            value = loss(columns(model, pairs, rows), None)
        finish(value, model, optimizer)

    return step


def ours(pairs, stack: ExitStack):
    model = SentenceTransformer(resolve_model(DEFAULT_ENCODER), device="cpu").train()
    form = training_form(model, freeze_embeddings=True, dropout=0.0, plain_attention=True)
    stack.enter_context(form)
    loss = MaskedRankingLoss(
        model, pairs.forbidden, autocast=precision_of("auto", torch.device("cpu"))
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)

    def step(pairs, rows):
        finish(loss(columns(model, pairs, rows), torch.tensor(rows)), model, optimizer)

    return step


def finish(value, model, optimizer) -> None:
    value.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


if __name__ == "__main__":
    main()
