"""Documents encoded per second, and what that does to the ranking.

    python benchmarks/encode.py                  # 1,000 documents of Vaswani, 5 rounds, quality
    python benchmarks/encode.py --quick          # one short round, no quality

The same model and texts on the same cores, each way in its own process time and wall time, in
rounds that interleave the ways; figures are medians over rounds, ratios are against
sentence-transformers' default `encode`. nDCG@10 is over all of Vaswani (11,429 documents, 93
queries) with the vectors of that way.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from fullrank.core import DEFAULT_ENCODER, Table, resolve_model
from fullrank.datasets import Dataset, read_dataset
from fullrank.evaluate import evaluate
from fullrank.retrieval import Dense, Encoder, Passages

BASE = "sentence-transformers"
Encode = Callable[[Sequence[str]], np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=DEFAULT_ENCODER)
    parser.add_argument("--data", default="vaswani", help="vaswani, cranfield, pydocs, a folder")
    parser.add_argument("--documents", type=int, default=1000, help="to time; evenly spread")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-quality", action="store_true", help="leave nDCG@10 out")
    parser.add_argument("--quick", action="store_true", help="200 documents, 1 round, no quality")
    args = parser.parse_args()
    if args.quick:
        args.documents, args.rounds, args.no_quality = 200, 1, True

    import torch

    torch.set_num_threads(args.threads)
    data = read_dataset(args.data)
    step = max(1, len(data.corpus) // args.documents)
    texts = list(data.corpus.contents)[::step][: args.documents]
    ways = make_ways(args.model)
    seconds = timed(ways, texts, args.rounds)
    rows = []
    for name, encode in ways.items():
        quality = None if args.no_quality else ndcg(data, encode)
        wall, cpu = (statistics.median(column) for column in zip(*seconds[name], strict=True))
        base_wall, base_cpu = (
            statistics.median(column) for column in zip(*seconds[BASE], strict=True)
        )
        speeds = [len(texts) / wall, base_wall / wall, len(texts) / cpu, base_cpu / cpu]
        rows.append([name, *speeds, quality])
    show(rows, f"{args.data}: {len(texts):,} documents, {args.threads} threads", args.rounds)


def make_ways(name: str) -> dict[str, Encode]:
    """The library as it comes, with bfloat16 weights, and our encoder in each dtype."""
    import torch
    from sentence_transformers import SentenceTransformer

    def library(dtype: torch.dtype) -> Encode:
        model = SentenceTransformer(resolve_model(name), device="cpu").to(dtype)
        return lambda texts: model.encode(list(texts), show_progress_bar=False).astype(np.float32)

    ways = {BASE: library(torch.float32), f"{BASE}, bfloat16": library(torch.bfloat16)}
    exact = Encoder(name, device="cpu", dtype="float32")
    default = Encoder(name, device="cpu")
    if default.dtype != "float32":
        ways["Encoder, float32"] = exact.encode
    ways[f"Encoder, default ({default.dtype})"] = default.encode
    return ways


def timed(
    ways: dict[str, Encode], texts: Sequence[str], rounds: int
) -> dict[str, list[tuple[float, float]]]:
    """Wall and CPU seconds of each round, the ways taking turns."""
    for encode in ways.values():
        encode(texts[:64])
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, encode in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            encode(texts)
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def ndcg(data: Dataset, encode: Encode) -> float:
    """nDCG@10 with documents and queries encoded in one way."""

    def unit(texts: Sequence[str]) -> np.ndarray:
        vectors = encode(texts)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    corpus = data.corpus
    dense = Dense(
        corpus,
        Encoder(device="cpu", dtype="float32"),
        vectors=unit(corpus.contents),
        passages=Passages.whole(corpus.contents),
    )
    dense.query_vectors.encode = unit
    run = dense(data.queries).drop(data.exclude)
    return evaluate(run, data.qrels, ["nDCG@10"]).mean["nDCG@10"]


def show(rows: list, title: str, rounds: int) -> None:
    base = rows[0][-1]
    for row in rows:
        row.append(None if base is None else row[-1] / base)
    columns = ["way", "docs/s", "ratio", "docs/CPU s", "ratio (CPU)", "nDCG@10", "of base"]
    formats = dict(zip(columns[1:], [",.0f", ".2f", ",.0f", ".2f", ".4f", ".4f"], strict=True))
    print(Table(columns, rows, f"{title}, median of {rounds} rounds", formats).markdown())


if __name__ == "__main__":
    main()
