"""PELA's claims in small: what the intermediate stage repairs, and what that is worth later.

    python benchmarks/shrink_pela.py --seeds 8
    FULLRANK_DATA=... python benchmarks/shrink_pela.py --only encoder

A network of three linear layers on scikit-learn's digits, its two hidden layers compressed.
Features: the mean squared distance of the student's hidden states to the teacher's on test images,
after two epochs of the stage with and without feature distillation, from the same student and in
the same number of steps. Transfer: the teacher knows the digits 0 to 5; after four epochs of the
stage on these, student and a new head are trained on 60 labelled images of the digits 6 to 9.
Encoder: all-MiniLM-L6-v2 at half its linear parameters, the stage on documents without labels;
cosine of held-out documents' embeddings to the original's, beside distilling the embeddings alone.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections import OrderedDict

import torch
from tiny_images import Images, accuracy, digits, fit, mean_and_spread
from tiny_lm import data_folder
from torch import nn

from fullrank.compress import Batches, Distillation
from fullrank.compress.pela import OMITTED, pela_compress
from fullrank.compress.pela_features import Features
from fullrank.compress.pela_loss import PELALoss
from fullrank.core import Table

HIDDEN = ("act1", "act2")
STAGES = {
    "SVD alone": None,
    "task": {"alpha": 0.0, "beta": 0.0},
    "features, without labels": {"alpha": 1.0, "beta": 0.0, "criterion": None},
    "task + features": {"alpha": 1.0, "beta": 0.0},
    "task + features + perturbation": {"alpha": 1.0, "beta": 1.0},
}


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [("fc1", nn.Linear(64, 64)), ("act1", nn.ReLU()), ("fc2", nn.Linear(64, 64))]
    return nn.Sequential(OrderedDict([*layers, ("act2", nn.ReLU()), ("head", nn.Linear(64, 10))]))


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


def stage(teacher: nn.Module, data: Images, ratio: float, weights, epochs: int, seed: int):
    """The student after the intermediate stage."""
    student = pela_compress(teacher, ratio)
    if weights is None:
        return student
    settings = {"criterion": nn.functional.cross_entropy, **weights}
    loss = PELALoss(student, teacher, hidden_states=HIDDEN, **settings)

    def of(_, x, y):
        return loss((x, y) if settings["criterion"] else x)

    return fit(student, data, epochs, adam(student), seed, of)


@torch.no_grad()
def feature_error(student: nn.Module, teacher: nn.Module, data: Images) -> float:
    run = [
        Features(m.eval(), HIDDEN).run(data.x_test, lambda m, x: m(x))[1]
        for m in (student, teacher)
    ]
    pairs = zip(*run, strict=True)
    return float(torch.stack([(a.value - b.value).square().mean() for a, b in pairs]).mean())


def features(ratios: list[float], seeds: int) -> Table:
    rows = []
    for ratio in ratios:
        found: dict[str, list[float]] = {name: [] for name in STAGES}
        scores: dict[str, list[float]] = {name: [] for name in STAGES}
        for seed in range(seeds):
            data = digits(seed).flat()
            teacher = network(seed)
            fit(teacher, data, 30, adam(teacher), seed)
            for name, weights in STAGES.items():
                student = stage(copy.deepcopy(teacher), data, ratio, weights, 2, seed)
                found[name].append(feature_error(student, teacher, data))
                scores[name].append(accuracy(student, data))
        base = sum(found["task"])
        for name in STAGES:
            change = sum(found[name]) / base - 1
            error = mean_and_spread(found[name], ".4f")
            rows.append([ratio, name, error, change, mean_and_spread(scores[name])])
    return Table(
        ["ratio", "stage", "feature error", "against task", "accuracy"],
        rows,
        title=f"Two epochs of the stage, {seeds} seeds (mean ± standard deviation)",
        formats={"against task": "+.0%"},
    )


def transfer(ratios: list[float], seeds: int, labelled: int = 60) -> Table:
    rows = []
    for ratio in ratios:
        found: dict[str, list[float]] = {name: [] for name in STAGES}
        for seed in range(seeds):
            data = digits(seed).flat()
            before, after = data.classes(range(6)), data.classes(range(6, 10))
            few = after._replace(x=after.x[:labelled], y=after.y[:labelled])
            teacher = network(seed)
            fit(teacher, before, 30, adam(teacher), seed)
            for name, weights in STAGES.items():
                student = stage(copy.deepcopy(teacher), before, ratio, weights, 4, seed)
                torch.manual_seed(seed)
                student.head = nn.Linear(64, 10)
                fit(student, few, 200, adam(student), seed)
                found[name].append(accuracy(student, few))
        alone = found["SVD alone"]
        for name, values in found.items():
            gained = [value - base for value, base in zip(values, alone, strict=True)]
            rows.append([ratio, name, mean_and_spread(values), mean_and_spread(gained, "+.3f")])
    return Table(
        ["ratio", "stage", "accuracy on 6 to 9", "against SVD alone"],
        rows,
        title=f"{labelled} labelled images of the new digits, {seeds} seeds",
    )


def encoder(steps: int, seed: int = 0, tokens: int = 64) -> Table:
    from sentence_transformers import SentenceTransformer

    from fullrank import datasets
    from fullrank.core import DEFAULT_ENCODER, resolve_model

    corpus = datasets.vaswani().corpus
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [corpus[corpus.ids[i]].contents for i in order[: 100 + 16 * steps]]
    held_out, texts = texts[:100], texts[100:]
    teacher = SentenceTransformer(resolve_model(DEFAULT_ENCODER), device="cpu")
    teacher.max_seq_length = tokens
    original = teacher.encode(held_out, convert_to_tensor=True)

    def cosine(model) -> float:
        return float((model.encode(held_out, convert_to_tensor=True) * original).sum(1).mean())

    alone = pela_compress(teacher, 2.0, (*OMITTED, "*pooler*"))
    rows = [["SVD alone", 0, cosine(alone)]]
    batches = list(Batches(teacher, texts, batch_size=16, max_length=tokens))
    for name, settings in {"hidden states": {}, "last block": {"hidden_states": "last"}}.items():
        student = copy.deepcopy(alone)
        loss = PELALoss(student, teacher, beta=0.0, **settings)
        student.train()
        optimizer = torch.optim.AdamW(student.parameters(), lr=3e-4)
        for step, batch in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = 3e-4 * (1 - step / len(batches))
            optimizer.zero_grad()
            loss(batch).backward()
            optimizer.step()
        rows.append([f"PELA, {name}", len(batches), cosine(student.eval())])
    student = copy.deepcopy(alone)
    Distillation(teacher, batches, steps=len(batches), lr=3e-4, seed=seed)(student)
    rows.append(["embeddings alone", len(batches), cosine(student)])
    return Table(
        ["stage", "steps of 16 texts", "cosine to the original"],
        rows,
        title="all-MiniLM-L6-v2 at ratio 2, documents of Vaswani without labels",
        formats={"cosine to the original": ".4f"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ratios", type=float, nargs="+", default=[2.0, 4.0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=32, help="of the encoder's stage")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["features", "transfer", "encoder"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only in (None, "features"):
        print(features(args.ratios, args.seeds).markdown(), end="\n\n")
    if args.only in (None, "transfer"):
        print(transfer(args.ratios, args.seeds).markdown(), end="\n\n")
    if args.only in (None, "encoder"):
        if data_folder() is None:
            print("FULLRANK_DATA is not set: no encoder.", file=sys.stderr)
            return
        print(encoder(args.steps).markdown())


if __name__ == "__main__":
    main()
