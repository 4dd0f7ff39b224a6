"""WeLore in small: what fine-tuning only the low-rank components is worth.

    FULLRANK_DATA=... python benchmarks/welore.py --seeds 3

A byte-level language model is trained on WikiText-2, compressed at several effective rank
reductions and fine-tuned on tinyshakespeare for equal steps: all parameters, the low-rank
components only, or the rest only. Bits per byte of held-out Shakespeare.
"""

from __future__ import annotations

import argparse
import statistics
import sys

import torch
from tiny_lm import bits_per_byte, clone, data_folder, pretrained, shakespeare, train

from fullrank.compress import WeLoreConfig, mark_trainable, welore_compress
from fullrank.core import Table
from fullrank.core.errors import InputError

WHO = ("all", "low-rank components", "the rest")


def tuned(compressed, who: str, steps: int, rate: float, data, seed: int) -> tuple[float, int]:
    model = clone(compressed)
    if who != "all":
        mark_trainable(model, train_norms=False)
        if who == "the rest":
            for block in model.blocks:
                for p in block.parameters():
                    p.requires_grad_(not p.requires_grad)
    parameters = [p for p in model.parameters() if p.requires_grad]
    train(model, torch.optim.AdamW(parameters, lr=rate), data[0], steps, seed)
    return bits_per_byte(model, data[1]), sum(p.numel() for p in parameters)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reductions", type=float, nargs="+", default=[0.3, 0.5])
    parser.add_argument("--pretraining", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()
    folder = data_folder()
    if folder is None:
        sys.exit("set FULLRANK_DATA to the folder of wikitext-2 and tinyshakespeare.txt")
    data = shakespeare(folder)
    found: dict[tuple[float, str], list[tuple[float, int, float]]] = {}
    for seed in range(args.seeds):
        base = pretrained(folder, 64, 2, args.pretraining, seed)
        for target in args.reductions:
            small, report = welore_compress(clone(base), WeLoreConfig(target, lrc_ratio=0.4999))
            for who in WHO:
                try:
                    bits, count = tuned(small, who, args.steps, args.lr, data, seed)
                except InputError as error:
                    print(f"seed {seed}, {target:.0%}, {who}: {error}", file=sys.stderr)
                    continue
                found.setdefault((target, who), []).append((bits, count, report.kept))
    rows = []
    for (target, who), values in found.items():
        bits = [v[0] for v in values]
        spread = f" ± {statistics.stdev(bits):.4f}" if len(bits) > 1 else ""
        mean = [statistics.fmean(v[i] for v in values) for i in (1, 2)]
        rows.append([target, who, len(bits), mean[1], round(mean[0]),
                     f"{statistics.fmean(bits):.4f}{spread}"])  # fmt: skip
    columns = ["reduction asked", "trained", "seeds", "kept", "trained parameters"]
    print(
        Table(
            [*columns, "bits per byte"],
            rows,
            title=f"Fine-tuned for {args.steps} steps",
            formats={"reduction asked": ".0%", "kept": ".1%", "trained parameters": ",d"},
        ).markdown()
    )


if __name__ == "__main__":
    main()
