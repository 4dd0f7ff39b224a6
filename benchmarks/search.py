"""Search time: BM25 against bm25s called directly, exact dense search against FAISS's flat index.

    python benchmarks/search.py
    python benchmarks/search.py --quick

Both sides of a comparison take turns, a run each; figures are medians over runs. A run is a pass
over all queries of Vaswani (BM25), over single queries one by one (p50 and p95 of their times), or
one batch. Ratios below 1 mean that ours takes less time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from fullrank.core import Table
from fullrank.datasets import read_dataset
from fullrank.retrieval import BM25, ExactSearch

Call = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="vaswani", help="for BM25: vaswani, pydocs, a folder")
    parser.add_argument("--vectors", type=int, default=18_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--singles", type=int, default=200, help="single queries a run")
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="2,000 vectors, 20 queries, 1 run")
    args = parser.parse_args()
    if args.quick:
        args.vectors, args.batch, args.singles, args.runs = 2000, 32, 20, 1

    import faiss
    import torch

    torch.set_num_threads(args.threads)
    faiss.omp_set_num_threads(args.threads)
    rows = [lexical(args), *dense(args)]
    title = f"top {args.k}, {args.threads} threads, median of {args.runs} interleaved runs"
    columns = [
        "search",
        "other",
        "ours, ms",
        "other, ms",
        "ratio",
        "p95 ours",
        "p95 other",
        "p95 ratio",
    ]
    formats = {c: ".3f" if "ratio" not in c else ".2f" for c in columns[2:]}
    print(Table(columns, rows, title, formats).markdown())


def lexical(args: argparse.Namespace) -> list:
    """A pass over all queries of a data set: tokenise, score, take the best."""
    import bm25s

    data = read_dataset(args.data)
    texts = list(data.queries.values())
    ours = BM25(data.corpus, depth=args.k)
    direct = bm25s.BM25()
    tokens = bm25s.tokenize(list(data.corpus.contents), stopwords="en", show_progress=False)
    direct.index(tokens, show_progress=False)

    def other() -> object:
        asked = bm25s.tokenize(texts, stopwords="en", show_progress=False)
        return direct.retrieve(asked, k=args.k, show_progress=False)

    mine, theirs = compare([lambda: ours(data.queries)], [other], args.runs)
    name = f"BM25, {len(texts)} queries, {len(data.corpus):,} documents"
    return [name, "bm25s", mine[0], theirs[0], mine[0] / theirs[0], None, None, None]


def dense(args: argparse.Namespace) -> list[list]:
    """Single queries and a batch over random unit vectors."""
    import faiss

    draw = np.random.default_rng(0)

    def unit(count: int) -> np.ndarray:
        x = draw.standard_normal((count, args.dimension)).astype(np.float32)
        return x / np.linalg.norm(x, axis=1, keepdims=True)

    vectors, queries, singles = unit(args.vectors), unit(args.batch), unit(args.singles)
    ours = ExactSearch(vectors)
    flat = faiss.IndexFlatIP(args.dimension)
    flat.add(vectors)
    same_results(ours, flat, queries, args.k)
    size = f"{args.vectors:,} x {args.dimension}"
    rows = []
    one_by_one = [singles[i : i + 1] for i in range(len(singles))]
    for name, batches in (
        (f"dense, 1 query, {size}", one_by_one),
        (f"dense, {args.batch} queries, {size}", [queries]),
    ):
        mine, theirs = compare(
            [lambda q=q: ours.top(q, args.k) for q in batches],
            [lambda q=q: flat.search(q, args.k) for q in batches],
            args.runs,
        )
        p95 = [None] * 3 if len(batches) == 1 else [mine[1], theirs[1], mine[1] / theirs[1]]
        rows.append([name, "FAISS flat", mine[0], theirs[0], mine[0] / theirs[0], *p95])
    return rows


def same_results(ours: ExactSearch, flat: object, queries: np.ndarray, k: int) -> None:
    """Stop when the two sides do not compute the same."""
    mine, theirs = ours.top(queries, k)[1], flat.search(queries, k)[0]
    np.testing.assert_allclose(mine, theirs, atol=1e-5)


def compare(
    ours: Sequence[Call], other: Sequence[Call], runs: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Medians over runs of p50 and p95, in milliseconds, of each side's calls."""
    found: tuple[list, list] = ([], [])
    for side in (ours, other):
        side[0]()
    for _ in range(runs):
        for side, calls in zip(found, (ours, other), strict=True):
            times = []
            for call in calls:
                began = time.perf_counter()
                call()
                times.append((time.perf_counter() - began) * 1e3)
            side.append((statistics.median(times), float(np.percentile(times, 95))))
    mine, theirs = (
        tuple(statistics.median(column) for column in zip(*side, strict=True)) for side in found
    )
    return mine, theirs


if __name__ == "__main__":
    main()
