"""RankMe (arXiv 2210.02885) as a judge of embeddings without labels: where it works, where not.

    FULLRANK_DATA=... python benchmarks/rankme.py

Three questions. Does RankMe of a self-supervised run's projector output choose the setting whose
encoder a linear probe likes best? Does it follow retrieval quality when dimensions are taken away
from a sentence encoder (PCA)? And does it notice noise (it does not: noise raises it)?

The gates are those of a reproduction: Spearman of RankMe and accuracy at least 0.6 with the
selected run within 0.5 points of the best; nDCG strictly falling with RankMe along the PCA. The
sweep of the learning rate has no gate: runs that have not converged keep the rank of their start.
"""

from __future__ import annotations

import argparse
import io
import itertools
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from fullrank.core import DEFAULT_ENCODER, Run, Table, resolve_model
from fullrank.datasets import cranfield
from fullrank.evaluate import evaluate
from fullrank.spectra import rankme, select_by_rankme

SPEARMAN, POINTS = 0.6, 0.005

# Setting -> its values; the rest of a run's settings are DEFAULTS.
SWEEPS = {
    "VICReg covariance weight": ("vicreg", "covariance", [0.0, 0.01, 0.1, 1.0, 10.0]),
    "VICReg variance weight": ("vicreg", "variance", [0.0, 0.5, 2.0, 10.0, 50.0]),
    "SimCLR temperature": ("simclr", "temperature", [0.02, 0.07, 0.15, 0.5, 2.0]),
    "SimCLR learning rate": ("simclr", "lr", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1]),
}
UNGATED = {"SimCLR learning rate"}
DEFAULTS = {
    "invariance": 25.0,
    "variance": 25.0,
    "covariance": 1.0,
    "temperature": 0.15,
    "lr": 1e-3,
}


class Images(NamedTuple):
    """Rows of ``(channels, side, side)`` images in [0, 1], and how a run over them is sized."""

    train: Tensor
    test: Tensor
    train_labels: np.ndarray
    test_labels: np.ndarray
    epochs: int
    batch: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=2, help="of the digits runs")
    parser.add_argument("--cifar-seeds", type=int, default=1, help="of the CIFAR-10 runs")
    parser.add_argument("--images", type=int, default=5_000, help="CIFAR-10 images to train on")
    parser.add_argument("--only", choices=["digits", "cifar", "text"], help="one part alone")
    args = parser.parse_args()
    began = time.process_time()
    if args.only in (None, "digits"):
        sweep_table("scikit-learn digits", digits(), list(SWEEPS), args.seeds)
    data = os.environ.get("FULLRANK_DATA")
    if data is None:
        print("FULLRANK_DATA is not set: the parts on CIFAR-10 and Cranfield are left out")
    else:
        if args.only in (None, "cifar"):
            names = [name for name in SWEEPS if name != "VICReg variance weight"]
            images = cifar(Path(data) / "cifar10", args.images)
            sweep_table(f"CIFAR-10, {len(images.train):,} images", images, names, args.cifar_seeds)
        if args.only in (None, "text"):
            text_tables()
    print(f"CPU time: {time.process_time() - began:.0f} s")


# -- self-supervised runs ------------------------------------------------------------------------


def digits() -> Images:
    found = load_digits()
    pixels = torch.tensor(found.images / 16, dtype=torch.float32)[:, None]
    parts = train_test_split(pixels, found.target, test_size=0.25, random_state=0)
    return Images(*parts, epochs=40, batch=256)


def cifar(folder: Path, count: int) -> Images:
    """Images of 16 x 16: a small network on a CPU sees no more in larger ones."""
    import pandas
    from PIL import Image

    def read(name: str, rows: int) -> tuple[Tensor, np.ndarray]:
        frame = pandas.read_parquet(folder / f"{name}.parquet").head(rows)
        column = "img" if "img" in frame else "image"
        pictures = [
            np.asarray(Image.open(io.BytesIO(cell["bytes"] if isinstance(cell, dict) else cell)))
            for cell in frame[column]
        ]
        pixels = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
        return nn.functional.avg_pool2d(pixels, 2), frame["label"].to_numpy()

    train, labels = read("train", count)
    test, test_labels = read("test", 3000)
    return Images(train, test, labels, test_labels, epochs=16, batch=512)


def view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Augment: shift by up to an eighth, change brightness and contrast, erase a patch, noise."""
    count, _, side, _ = images.shape
    reach, patch = max(1, side // 8), side // 4

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, 1, generator=generator)

    def places(high: int) -> Tensor:
        return torch.randint(0, high, (2, count), generator=generator)

    padded = nn.functional.pad(images, [reach] * 4, mode="replicate")
    top, left = places(2 * reach + 1)
    steps = torch.arange(side)
    rows = (top[:, None] + steps)[:, None, :, None]
    columns = (left[:, None] + steps)[:, None, None, :]
    which = torch.arange(count)[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    out = padded[which, channel, rows, columns] * uniform(0.6, 1.4) + uniform(-0.1, 0.1)
    top, left = places(side - patch + 1)
    in_rows = (steps >= top[:, None]) & (steps < top[:, None] + patch)
    in_columns = (steps >= left[:, None]) & (steps < left[:, None] + patch)
    erased = (in_rows[:, :, None] & in_columns[:, None, :])[:, None]
    out = out.masked_fill(erased, 0.0)
    return out + 0.05 * torch.randn(out.shape, generator=generator)


def vicreg(a: Tensor, b: Tensor, settings: dict[str, float]) -> Tensor:
    """Invariance, variance and covariance terms (arXiv 2105.04906, equations 1 to 6)."""
    loss = settings["invariance"] * nn.functional.mse_loss(a, b)
    for z in (a, b):
        centred = z - z.mean(0)
        spread = (centred.var(0) + 1e-4).sqrt()
        covariance = centred.T @ centred / (len(z) - 1)
        off = covariance.square().sum() - covariance.diagonal().square().sum()
        loss = loss + settings["variance"] / 2 * nn.functional.relu(1 - spread).mean()
        loss = loss + settings["covariance"] * off / z.shape[1]
    return loss


def simclr(a: Tensor, b: Tensor, settings: dict[str, float]) -> Tensor:
    """NT-Xent: each view has to find the other of its image (arXiv 2002.05709, equation 1)."""
    z = nn.functional.normalize(torch.cat([a, b]))
    similar = z @ z.T / settings["temperature"]
    similar.fill_diagonal_(-torch.inf)
    count = len(a)
    target = torch.cat([torch.arange(count, 2 * count), torch.arange(count)])
    return nn.functional.cross_entropy(similar, target)


LOSSES: dict[str, Callable[[Tensor, Tensor, dict[str, float]], Tensor]] = {
    "vicreg": vicreg,
    "simclr": simclr,
}


def pretrain(
    images: Images, method: str, settings: dict[str, float], seed: int
) -> tuple[float, float]:
    """Train without labels; return RankMe of the projector output and the probe's accuracy."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    width = images.train[0].numel()
    encoder = nn.Sequential(nn.Flatten(), *block(width, 128), nn.Linear(128, 128))
    projector = nn.Sequential(*block(128, 128), nn.Linear(128, 64))
    model = nn.Sequential(encoder, projector)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["lr"])
    for _ in range(images.epochs):
        order = torch.randperm(len(images.train), generator=generator)
        for rows in order.split(images.batch):
            if len(rows) < images.batch // 2:
                continue
            batch = images.train[rows]
            loss = LOSSES[method](
                model(view(batch, generator)), model(view(batch, generator)), settings
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        seen, unseen = encoder(images.train), encoder(images.test)
        score = rankme(projector(seen))
    return score, probe(seen.numpy(), unseen.numpy(), images)


def block(inputs: int, outputs: int) -> list[nn.Module]:
    # No batch normalisation: it would keep a run from collapsing that the loss lets collapse.
    return [nn.Linear(inputs, outputs), nn.ReLU()]


def probe(seen: np.ndarray, unseen: np.ndarray, images: Images) -> float:
    """Accuracy of logistic regression on the encoder output as it is: not standardised."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it stops at max_iter
        fitted = LogisticRegression(max_iter=200).fit(seen, images.train_labels)
    return float(fitted.score(unseen, images.test_labels))


def sweep_table(title: str, images: Images, names: list[str], seeds: int) -> None:
    rows = []
    for name in names:
        method, setting, values = SWEEPS[name]
        found = np.array(
            [
                [pretrain(images, method, DEFAULTS | {setting: v}, seed) for seed in range(seeds)]
                for v in values
            ]
        ).mean(1)
        scores, accuracy = found.T
        order = float(spearmanr(scores, accuracy).statistic)
        runs = {f"{v:g}": float(s) for v, s in zip(values, scores, strict=True)}
        chosen = float(accuracy[list(runs).index(select_by_rankme(runs))])
        holds = order >= SPEARMAN and chosen >= accuracy.max() - POINTS
        rows.append(
            [
                name,
                ", ".join(runs),
                ", ".join(f"{s:.1f}" for s in scores),
                ", ".join(f"{100 * a:.1f}" for a in accuracy),
                f"{order:.2f}",
                f"{100 * chosen:.1f} of {100 * accuracy.max():.1f}",
                "none" if name in UNGATED else "holds" if holds else "**does not hold**",
            ]
        )
    print(f"\n{title}, {seeds} seed(s), {images.epochs} epochs\n")
    columns = ["setting", "values", "RankMe", "probe, %", "Spearman", "chosen of best, %", "gate"]
    print(Table(columns, rows).markdown(), flush=True)


# -- a sentence encoder --------------------------------------------------------------------------


@torch.no_grad()
def layers(texts: list[str], tokens: int = 64) -> list[np.ndarray]:
    """Mean-pooled output of every layer of the embedded encoder, not normalised, ``(N, 384)``."""
    from transformers import AutoModel, AutoTokenizer

    folder = resolve_model(DEFAULT_ENCODER)
    model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out: list[np.ndarray] = []
    for rows in (order[i : i + 64] for i in range(0, len(order), 64)):
        batch = tokenizer(
            [texts[i] for i in rows],
            padding=True,
            truncation=True,
            max_length=tokens,
            return_tensors="pt",
        )
        states = model(**batch, output_hidden_states=True).hidden_states
        mask = batch["attention_mask"][:, :, None]
        for number, state in enumerate(states):
            if len(out) <= number:
                out.append(np.zeros((len(texts), state.shape[2])))
            out[number][rows] = ((state * mask).sum(1) / mask.sum(1)).numpy()
    return out


def text_tables() -> None:
    data = cranfield()
    qrels = {q: {d: int(g > 0) for d, g in judged.items()} for q, judged in data.qrels.items()}
    names = [q for q in data.queries if q in qrels]
    documents = layers(list(data.corpus.contents))
    queries = layers([data.queries[q] for q in names])
    ids = np.array(data.corpus.ids, dtype=object)

    def ndcg(docs: np.ndarray, asked: np.ndarray) -> float:
        unit = [z / np.linalg.norm(z, axis=1, keepdims=True) for z in (asked, docs)]
        scores = unit[0] @ unit[1].T
        top = np.argsort(-scores, axis=1, kind="stable")[:, :10]
        run = Run({q: (ids[t], s[t]) for q, t, s in zip(names, top, scores, strict=True)})
        return evaluate(run, qrels, ["nDCG@10"]).mean["nDCG@10"]

    warnings.simplefilter("ignore")  # 1,400 samples of width 384: more than 2 K
    docs, asked = documents[-1], queries[-1]
    axes = np.linalg.svd(docs, full_matrices=False)[2].T
    kept = [384, 128, 64, 32, 16, 8, 4, 2]
    cut = [(docs @ axes[:, :k], asked @ axes[:, :k]) for k in kept]
    scores, quality = [rankme(d) for d, _ in cut], [ndcg(d, q) for d, q in cut]
    falls = all(a > b for column in (scores, quality) for a, b in itertools.pairwise(column))
    print(f"\nThe embedded encoder on Cranfield, {len(docs):,} documents of 64 tokens\n")
    rows = [[k, f"{s:.1f}", f"{n:.3f}"] for k, s, n in zip(kept, scores, quality, strict=True)]
    print(Table(["PCA dimensions", "RankMe", "nDCG@10"], rows).markdown())
    print(f"\nBoth fall at every step: {'yes, the gate holds' if falls else '**no**'}.\n")

    draw = np.random.default_rng(0)
    rows = []
    for noise in (0.0, 0.03, 0.1, 0.3):
        noisy = docs + noise * draw.standard_normal(docs.shape)
        rows.append([f"{noise:g}", f"{rankme(noisy):.1f}", f"{ndcg(noisy, asked):.3f}"])
    rows.append(["noise alone", f"{rankme(draw.standard_normal(docs.shape)):.1f}", ""])
    print(Table(["noise added, std", "RankMe", "nDCG@10"], rows).markdown(), "\n")

    rows = [[n, f"{rankme(docs[:n]):.1f}"] for n in (64, 128, 256, 512, 1024, len(docs))]
    print(Table(["documents", "RankMe"], rows).markdown(), "\n")
    rows = [
        [number, f"{rankme(d):.1f}", f"{ndcg(d, q):.3f}"]
        for number, (d, q) in enumerate(zip(documents, queries, strict=True))
    ]
    print(Table(["layer", "RankMe", "nDCG@10"], rows).markdown(), "\n", flush=True)


if __name__ == "__main__":
    main()
