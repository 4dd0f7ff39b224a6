"""AdamP and SGDP beside the official code, and the small claims of their paper.

    python benchmarks/adamp.py                  # all of it
    python benchmarks/adamp.py speed            # or: toy, vision, text

``speed``: CPU time of a step in one process, one thread, on 21 matrices of 9.49 M parameters, with
random gradients (no weight passes the test) and with gradients orthogonal to each row (all do);
the official code is the package adamp:

    pip install --no-deps adamp

``toy``: the two-dimensional example. ``vision``: a convolutional network with batch norm on
CIFAR-10; norms of its kernels, accuracy, and how often which weight is projected (the paper uses
ImageNet). ``text``: a small Transformer whose linear layers are weight-normed, on WikiText-2's
validation text. The last two read the folder named by FULLRANK_DATA.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import io
import statistics
import sys
import time
from pathlib import Path

import torch
from tiny_lm import TinyLM, bits_per_byte, data_folder, train, wikitext
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fullrank.core import Table
from fullrank.optim.adamp import SGDP, AdamP

SHAPES = [(512, 512)] * 12 + [(1376, 512)] * 6 + [(512, 1376)] * 3


# -- speed -----------------------------------------------------------------------------------


def official():
    """The package adamp, which imports a name that torch no longer has; None if absent."""
    # This script has the package's name, and comes first on the path.
    here = Path(__file__).resolve().parent
    elsewhere = [path for path in sys.path if Path(path).resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("adamp", elsewhere)
    if spec is None:
        return None
    optimizer = importlib.import_module("torch.optim.optimizer")
    if not hasattr(optimizer, "required"):
        optimizer.required = object()
    package = sys.modules["adamp"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def matrices(orthogonal: bool) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for shape in SHAPES:
        weight = nn.Parameter(0.02 * torch.randn(shape, generator=generator))
        weight.grad = torch.randn(shape, generator=generator)
        if orthogonal:
            g, w = weight.grad, weight.detach()
            g -= w * ((g * w).sum(1, keepdim=True) / (w * w).sum(1, keepdim=True))
        found.append(weight)
    return found


def milliseconds(work) -> float:
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began)


def speed(rounds: int) -> None:
    package = official()
    if package is None:
        print("adamp is not installed: pip install --no-deps adamp", file=sys.stderr)
    adam, sgd = {"lr": 1e-9, "weight_decay": 0.01}, {"lr": 1e-9, "weight_decay": 1e-5}
    cases = {
        "AdamP": (AdamP, adam),
        "AdamP, nesterov": (AdamP, {**adam, "nesterov": True}),
        "SGDP": (SGDP, {**sgd, "momentum": 0.9}),
        "SGDP, nesterov": (SGDP, {**sgd, "momentum": 0.9, "nesterov": True}),
    }
    rows = []
    for orthogonal in (False, True):
        fused_weights = matrices(orthogonal)
        fused = torch.optim.AdamW(fused_weights, fused=True, **adam)
        for name, (kind, options) in cases.items():
            makes = {"fullrank": kind, "AdamW (fused)": None}
            if package is not None:
                makes["official"] = getattr(package, kind.__name__)
            made = {
                key: fused if make is None else make(matrices(orthogonal), **options)
                for key, make in makes.items()
            }
            times: dict[str, list[float]] = {key: [] for key in made}
            for turn in range(rounds + 3):
                for key, optimizer in made.items():
                    spent = milliseconds(optimizer.step)
                    if turn >= 3:
                        times[key].append(spent)
            t = {key: statistics.median(values) for key, values in times.items()}
            theirs = t.get("official")
            rows.append(
                [
                    name,
                    "every matrix" if orthogonal else "none",
                    t["AdamW (fused)"],
                    theirs,
                    t["fullrank"],
                    theirs / t["fullrank"] if theirs else None,
                ]
            )
    columns = ["AdamW (fused), ms", "official, ms", "fullrank, ms"]
    title = f"CPU time of a step, {len(SHAPES)} matrices, 9.49 M parameters, float32, one thread"
    formats = {**dict.fromkeys(columns, ".1f"), "official / fullrank": ".2f"}
    header = ["optimizer", "projected", *columns, "official / fullrank"]
    print(Table(header, rows, title=title, formats=formats).markdown())


# -- the two-dimensional example ---------------------------------------------------------------


def toy() -> None:
    def run(make):
        start = torch.tensor([[1.0, 0.02]], dtype=torch.float64)
        w = nn.Parameter(start / start.norm())
        optimizer = make([w])
        for _ in range(200):
            w.grad = torch.autograd.grad(-w[0, 1] / w.norm(), w)[0]
            optimizer.step()
        w = w.detach()
        return float(w.norm()), float(1 - w[0, 1] / w.norm())

    rows = [["SGD", None, *run(lambda p: torch.optim.SGD(p, lr=0.3))]]
    for momentum in (0.9, 0.95, 0.99):
        for name, kind in (("SGD", torch.optim.SGD), ("SGDP", SGDP)):
            found = run(lambda p, k=kind, m=momentum: k(p, lr=0.3, momentum=m))
            rows.append([name, momentum, *found])
    print(
        Table(
            ["optimizer", "momentum", "final norm", "1 - cosine"],
            rows,
            title="Minimise -cos(w, w*) in two dimensions, 200 steps at rate 0.3",
            formats={"final norm": ".3f", "1 - cosine": ".1e"},
        ).markdown()
    )


# -- images ------------------------------------------------------------------------------------


def cifar(folder, part: str, count: int):
    import pyarrow.parquet as parquet
    from PIL import Image

    table = parquet.read_table(folder / "cifar10" / f"{part}.parquet").slice(0, count)
    images, labels = [], []
    for row in table.to_pylist():
        data = row["img"]["bytes"] if isinstance(row["img"], dict) else row["img"]
        image = Image.open(io.BytesIO(data)).convert("RGB")
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        images.append(pixels.view(32, 32, 3).permute(2, 0, 1))
        labels.append(row["label"])
    return torch.stack(images).float() / 127.5 - 1, torch.tensor(labels)


def conv_net(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inside, outside in ((3, width), (width, width), (width, 2 * width), (2 * width, 2 * width)):
        layers += [nn.Conv2d(inside, outside, 3, 2 if len(layers) else 1, 1, bias=False)]
        layers += [nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


def vision(seeds: int, epochs: int, images: int) -> None:
    folder = data_folder()
    if folder is None:
        print("vision: set FULLRANK_DATA to the data folder", file=sys.stderr)
        return
    x, y = cifar(folder, "train", images)
    test_x, test_y = cifar(folder, "test", 3000)
    makes = {
        "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        "SGDP": lambda p: SGDP(p, lr=0.1, momentum=0.9),
        "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.0),
        "AdamP": lambda p: AdamP(p, lr=1e-3),
    }
    rows = []
    for name, make in makes.items():
        norms, scores, convs, heads = [], [], [], []
        for seed in range(seeds):
            torch.manual_seed(seed)
            model = conv_net(32)
            optimizer = make(list(model.parameters()))
            kernels = [m.weight for m in model if isinstance(m, nn.Conv2d)]
            steps = epochs * (len(x) // 128)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            for _ in range(epochs):
                for part in torch.randperm(len(x)).split(128)[: len(x) // 128]:
                    optimizer.zero_grad()
                    nn.functional.cross_entropy(model(x[part]), y[part]).backward()
                    optimizer.step()
                    schedule.step()
                    if hasattr(optimizer, "branch"):
                        convs += [optimizer.branch(kernel) > 0 for kernel in kernels]
                        heads.append(optimizer.branch(model[-1].weight) > 0)
            model.eval()
            with torch.no_grad():
                scores.append((model(test_x).argmax(1) == test_y).float().mean().item())
            norms.append(statistics.mean(k.norm().item() for k in kernels))
        share = [statistics.mean(s) if s else None for s in (convs, heads)]
        spread = statistics.stdev(scores) if len(scores) > 1 else None
        rows.append([name, statistics.mean(norms), statistics.mean(scores), spread, *share])
    shares = ["kernels projected", "head projected"]
    print(
        Table(
            ["optimizer", "mean norm of kernels", "accuracy", "std over seeds", *shares],
            rows,
            title=f"CIFAR-10, {len(x)} images, 4 convolutions with batch norm, {epochs} epochs, "
            f"{seeds} seeds, no weight decay",
            formats={
                "mean norm of kernels": ".2f",
                "accuracy": ".3f",
                "std over seeds": ".3f",
                **dict.fromkeys(shares, ".1%"),
            },
        ).markdown()
    )


# -- text --------------------------------------------------------------------------------------


def text(seeds: int, steps: int) -> None:
    folder = data_folder()
    if folder is None:
        print("text: set FULLRANK_DATA to the data folder", file=sys.stderr)
        return
    train_data, test_data = wikitext(folder)
    makes = {
        "AdamW": lambda p: torch.optim.AdamW(p, lr=3e-3, weight_decay=0.01),
        "AdamP": lambda p: AdamP(p, lr=3e-3, weight_decay=0.01),
    }
    rows = []
    for normed in (False, True):
        for name, make in makes.items():
            found = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = TinyLM(64, 2)
                if normed:
                    for module in list(model.blocks.modules()):
                        if isinstance(module, nn.Linear):
                            weight_norm(module)
                train(model, make(list(model.parameters())), train_data, steps, seed)
                found.append(bits_per_byte(model, test_data))
            spread = statistics.stdev(found) if len(found) > 1 else None
            rows.append([name, "yes" if normed else "no", statistics.mean(found), spread])
    print(
        Table(
            ["optimizer", "weight norm", "bits per byte", "std over seeds"],
            rows,
            title=f"WikiText-2 (bytes), Transformer of width 64, {steps} steps, {seeds} seeds",
            formats={"bits per byte": ".4f", "std over seeds": ".4f"},
        ).markdown()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["speed", "toy", "vision", "text"])
    parser.add_argument("--rounds", type=int, default=30, help="steps timed")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--images", type=int, default=15_000)
    parser.add_argument("--steps", type=int, default=2_000, help="of the language model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "speed": lambda: speed(args.rounds),
        "toy": toy,
        "vision": lambda: vision(args.seeds, args.epochs, args.images),
        "text": lambda: text(args.seeds, args.steps),
    }
    for name, work in parts.items():
        if args.part in (None, name):
            work()
            print()


if __name__ == "__main__":
    main()
