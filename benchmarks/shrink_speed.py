"""How much faster the shrunk encoder is: float32 and bfloat16, beside the original, in turns.

    python benchmarks/shrink_speed.py --threads 2

Uniform ranks and ranks by sensitivity, at 50 % of the linear parameters (``--share``), 32 texts of
128 tokens; and with layers left dense that are measured to be slower factorised. Wall time, the
fastest of the rounds, original and shrunk models taking turns.
"""

from __future__ import annotations

import argparse
import copy
import time

import torch

from fullrank import datasets
from fullrank.bench.timing import interleaved_times
from fullrank.compress import Batches, CalibrationStats, PlanFamily
from fullrank.compress.targets import factorisable
from fullrank.core import DEFAULT_ENCODER, Table
from fullrank.core.batches import call
from fullrank.core.models import load_sentence_transformer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    model = load_sentence_transformer(DEFAULT_ENCODER, device="cpu").eval()
    corpus = datasets.pydocs().corpus
    contents = [corpus[i].contents for i in corpus.ids[:256]]
    layers = factorisable(model, exclude="*pooler*")
    stats = CalibrationStats(layers, gradients=True)
    stats.observe(model, Batches(model, contents, max_length=64), progress=False)
    whole = [" ".join(contents[i : i + 8]) for i in range(args.texts)]
    batch = next(iter(Batches(model, whole, max_length=128, batch_size=args.texts)))

    ways = {"original": model}
    kept = {"original": 1.0}
    for allocation in ("uniform", "sensitivity"):
        for faster in (None, batch):
            name = allocation if faster is None else f"{allocation}, faster layers only"
            family = PlanFamily(
                model, stats, allocation=allocation, exclude="*pooler*", faster_on=faster
            )
            plan = family.plan(args.share)
            ways[name], kept[name] = family.build(plan).eval(), plan.savings().kept
    times = {
        dtype: race(ways, batch, dtype, args.rounds) for dtype in (torch.float32, torch.bfloat16)
    }
    rows = [
        [name, kept[name], *(times[d]["original"] / times[d][name] for d in times)]
        for name in ways
        if name != "original"
    ]
    size = tuple(batch["input_ids"].shape)
    seconds = " and ".join(f"{times[d]['original']:.0f} ms" for d in times)
    title = f"{size[0]} x {size[1]} tokens, {args.threads} threads; the original takes {seconds}"
    columns = ["ranks", "kept", "times faster, float32", "times faster, bfloat16"]
    formats = {columns[1]: ".1%", columns[2]: ".2f", columns[3]: ".2f"}
    print(Table(columns, rows, title, formats).markdown())


def race(ways, batch, dtype, rounds):
    """Milliseconds of each model's forward pass, in turns."""

    def step(model):
        @torch.no_grad()
        def forward(clock):
            began = clock()
            call(model, batch)
            return (clock() - began,)

        return forward

    steps = {name: step(copy.deepcopy(model).to(dtype)) for name, model in ways.items()}
    # On several threads it is wall time that counts.
    found = interleaved_times(steps, time.perf_counter, cycle=1, cycles=rounds, warmup=2, turn=1)
    return {name: ms for name, (ms,) in found.items()}


if __name__ == "__main__":
    main()
