"""Quality against size of the embedded encoder: how ranks are given out, and recovery.

    python benchmarks/shrink_encoder.py --data vaswani --documents 2000

For each share of the linear parameters: uniform ranks with output PCA (LoRD as it is usually
run), ranks by sensitivity with Gauss-Newton factors, and both after the same short recovery.
Calibration texts are never among the documents or queries that are measured.
"""

from __future__ import annotations

import argparse
import random
import sys
import time

import numpy as np

from fullrank import datasets
from fullrank.compress import Batches, CalibrationStats, Distillation, PlanFamily
from fullrank.compress.targets import factorisable
from fullrank.core import DEFAULT_ENCODER, Table, resolve_model
from fullrank.evaluate import floor_test
from fullrank.retrieval import RankingMetric

WAYS = {
    "uniform, output PCA": {"method": "output_pca", "allocation": "uniform"},
    "uniform, Gauss-Newton": {"method": "gauss_newton", "allocation": "uniform"},
    "sensitivity, output PCA": {"method": "output_pca", "allocation": "sensitivity"},
    "sensitivity, Gauss-Newton": {"method": "gauss_newton", "allocation": "sensitivity"},
}
RECOVERED = {"uniform, output PCA", "sensitivity, Gauss-Newton"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="vaswani", choices=["vaswani", "cranfield", "pydocs"])
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--texts", type=int, default=512, help="calibration texts")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=60, help="of recovery; 0 for none")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.75, 0.6, 0.5, 0.4])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(resolve_model(DEFAULT_ENCODER), device="cpu")
    model.max_seq_length = args.tokens
    corpus, part, texts, held_out = prepare(args)
    metric = RankingMetric(
        "nDCG@10", corpus, part.queries, part.qrels, exclude=part.exclude, max_tokens=args.tokens
    )
    reference = metric(model)
    original = model.encode(held_out, convert_to_tensor=True)
    measure = measure_with(metric, reference, original, held_out)

    began = time.process_time()
    stats = CalibrationStats(factorisable(model), gradients=True)
    stats.observe(model, Batches(model, texts, max_length=args.tokens), seed=args.seed)
    calibration_seconds = time.process_time() - began

    rows = []
    for name in args.ways:
        family = PlanFamily(model, stats, **WAYS[name])
        for share in args.shares:
            plan = family.plan(share)
            small = family.build(plan)
            rows.append([name, 0, plan.savings().kept, *measure(small)])
            print(*rows[-1], file=sys.stderr)
            if args.steps and name in RECOVERED:
                recover = Distillation(
                    model, texts, steps=args.steps, max_length=args.tokens, seed=args.seed
                )
                recover(small)
                rows.append([name, args.steps, plan.savings().kept, *measure(small)])
                print(*rows[-1], file=sys.stderr)

    print(
        Table(
            ["way", "recovery steps", "kept", "cosine", "nDCG@10", "ratio", "lower 95 %"],
            rows,
            title=f"{args.data}: {len(corpus):,} documents, {len(reference)} queries, "
            f"nDCG@10 {reference.mean():.4f} before; {len(texts)} calibration texts took "
            f"{calibration_seconds:.1f} s CPU",
            formats={
                "kept": ".1%",
                "cosine": ".4f",
                "nDCG@10": ".4f",
                "ratio": ".4f",
                "lower 95 %": ".4f",
            },
        ).markdown()
    )


def prepare(args: argparse.Namespace) -> tuple:
    """Documents and queries to measure on, texts to calibrate on, texts to compare on."""
    draw = random.Random(args.seed)
    data = getattr(datasets, args.data)()
    train = data.split("train") if data.parts else None
    part = data.split("test") if data.parts else data
    judged = {d for judgements in part.qrels.values() for d in judgements}
    kept = [i for i in data.corpus.ids if i in judged]
    others = [i for i in data.corpus.ids if i not in judged]
    draw.shuffle(others)
    # What is measured, then what is compared, then what is calibrated on.
    measured = max(0, min(args.documents - len(kept), len(others) - args.texts - 100))
    kept += others[:measured]
    contents = [data.corpus[i].contents for i in others[measured:]]
    held_out, contents = contents[:100], contents[100:]
    queries = list(train.queries.values()) if train is not None else []
    draw.shuffle(queries)
    texts = queries[: args.texts // 2]
    texts += contents[: args.texts - len(texts)]
    if not queries:
        # No queries to learn from: the beginnings of documents stand in for them.
        texts = [" ".join(t.split()[:12]) if i % 4 == 0 else t for i, t in enumerate(texts)]
    return data.corpus.subset(kept), part, texts, held_out


def measure_with(metric, reference, original, held_out):
    """Return a function from a model to its row of the table."""

    def measure(model):
        found = model.encode(held_out, convert_to_tensor=True)
        cosine = float((found * original).sum(1).mean())
        values = metric(model)
        test = floor_test(values, reference, 0.97)
        return [cosine, float(np.mean(values)), float(test.ratio), float(test.lower)]

    return measure


if __name__ == "__main__":
    main()
