"""MKOR beside the official code: CPU time of a step, memory of the factors, and small claims.

    python benchmarks/mkor.py                   # all of it
    python benchmarks/mkor.py speed --official /path/to/a/clone/of/mkor
    python benchmarks/mkor.py digits            # or: hybrid

``speed``: one process, one thread, 21 linear layers of 9.49 M parameters, a refresh every f steps;
normal and refresh steps by how many refreshes there have been, since fullrank's factors are the
identity less as many outer products. The official code is not a package: clone
https://github.com/Mohammad-Mozaffari/mkor and name the folder. It runs with float32 factors.

``digits``: scikit-learn's digits, an autoencoder and a classifier, SGD against MKOR.
``hybrid``: MKOR-H's losses and refreshes beside MKOR's.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import statistics
import sys
import time
import warnings
from itertools import pairwise

import torch
from torch import nn

from fullrank.core import Table
from fullrank.optim.memory import human_bytes
from fullrank.optim.mkor import MKOR
from fullrank.optim.mkor_hybrid import MKORH

SHAPES = [(512, 512)] * 12 + [(1376, 512)] * 6 + [(512, 1376)] * 3
ROWS = 256


# -- speed -----------------------------------------------------------------------------------


class Layers(nn.Module):
    """All layers side by side, each with its own input."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(n, m, bias=False) for m, n in SHAPES])

    def forward(self, inputs):
        losses = (layer(x).square().mean() for layer, x in zip(self.layers, inputs, strict=True))
        return sum(losses)


def milliseconds(work) -> float:
    began = time.process_time()
    work()
    return 1e3 * (time.process_time() - began)


def official(folder: str, model: nn.Module):
    sys.path.insert(0, folder)
    kind = importlib.import_module("mkor.mkor").MKOR
    with contextlib.redirect_stdout(io.StringIO()):
        return kind(model, optimizer="sgd", half_precision=False, inv_freq=1, lr=1e-2)


def pass_through(model: nn.Module, inputs) -> None:
    model.zero_grad()
    model(inputs).backward()


def steps_of(optimizer, steps: int) -> float:
    """Median of normal steps: the schedule is put between two refreshes for their time."""
    kept = optimizer.inv_freq, optimizer.steps
    optimizer.inv_freq, optimizer.steps = 1 << 60, 1
    found = statistics.median(milliseconds(optimizer.step) for _ in range(steps))
    optimizer.inv_freq, optimizer.steps = kept
    return found


def speed(folder: str | None, marks: list[int], steps: int) -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    ours, theirs, plain = Layers(), Layers(), Layers()
    theirs.load_state_dict(ours.state_dict())
    made = {"fullrank": (ours, MKOR(ours, torch.optim.SGD(ours.parameters(), lr=1e-2), 1))}
    if folder is None:
        print("no --official folder: its columns are missing", file=sys.stderr)
    else:
        made["official"] = (theirs, official(folder, theirs))
    rows = []
    for turn in range(1, marks[-1] + 1):
        inputs = [torch.randn(ROWS, n) for _, n in SHAPES]
        passes, refresh = {}, {}
        for name, (model, optimizer) in made.items():
            passes[name] = milliseconds(lambda m=model: pass_through(m, inputs))  # noqa: B023
            refresh[name] = milliseconds(optimizer.step)
        if turn not in marks:
            continue
        hooks = passes["fullrank"] - milliseconds(lambda: pass_through(plain, inputs))  # noqa: B023
        apart = None
        if "official" in made:
            pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
            apart = max(((a.grad - b.grad).norm() / b.grad.norm()).item() for a, b in pairs)
        kept = {
            name: {k: v.clone() for k, v in m.state_dict().items()} for name, (m, _) in made.items()
        }
        normal = {name: steps_of(optimizer, steps) for name, (_, optimizer) in made.items()}
        for name, (model, _) in made.items():  # the timed steps are not part of the run
            model.load_state_dict(kept[name])
        rows.append(
            [
                turn,
                normal.get("official"),
                normal["fullrank"],
                normal["official"] / normal["fullrank"] if "official" in normal else None,
                refresh.get("official"),
                refresh["fullrank"],
                hooks,
                made["fullrank"][1].factor_bytes(),
                apart,
            ]
        )
    times = ["official, ms", "fullrank, ms", "official refresh, ms", "fullrank refresh, ms"]
    dense = sum(4 * (m * m + n * n) for m, n in SHAPES)
    print(
        Table(
            [
                "refreshes",
                *times[:2],
                "official / fullrank",
                *times[2:],
                "hooks at a refresh, ms",
                "factors",
                "gradients differ by",
            ],
            rows,
            title=f"CPU time of a step, {len(SHAPES)} linear layers, 9.49 M parameters, "
            f"{ROWS} rows, float32, one thread; factors as matrices take {human_bytes(dense)}",
            formats={
                **dict.fromkeys([*times, "hooks at a refresh, ms"], ".1f"),
                "official / fullrank": ".1f",
                "factors": human_bytes,
                "gradients differ by": ".1e",
            },
        ).markdown()
    )


# -- digits ------------------------------------------------------------------------------------


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(data.target)


def network(task: str) -> nn.Sequential:
    sizes = {"autoencoder": (64, 48, 12, 48, 64), "classifier": (64, 48, 32, 10)}[task]
    layers: list[nn.Module] = []
    for inside, outside in pairwise(sizes):
        layers += [nn.Linear(inside, outside), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def final_loss(task: str, lr: float, make, seed: int, steps: int) -> tuple[float, object]:
    """Mean loss over all data after training, and the optimizer."""
    x, y = digits()
    torch.manual_seed(seed)
    model = network(task)

    def loss_of(part):
        if task == "autoencoder":
            return nn.functional.mse_loss(model(x[part]), x[part])
        return nn.functional.cross_entropy(model(x[part]), y[part])

    optimizer = make(model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        part = torch.randint(0, len(x), (128,), generator=generator)
        optimizer.zero_grad()
        loss = loss_of(part)
        loss.backward()
        if isinstance(optimizer, MKORH):
            optimizer.step(loss=loss)
        else:
            optimizer.step()
    with torch.no_grad():
        return loss_of(slice(None)).item(), optimizer


def claims(seeds: int, steps: int) -> None:
    makes = {
        "SGD": lambda model, inner: inner,
        "MKOR, f = 10": lambda model, inner: MKOR(model, inner),
        "MKOR, f = 1": lambda model, inner: MKOR(model, inner, inv_freq=1),
    }
    rows = []
    rates = {"autoencoder": (0.1, 0.3, 1.0, 3.0, 10.0), "classifier": (0.03, 0.1, 0.3, 1.0)}
    for task, each in rates.items():
        for lr in each:
            found = [
                statistics.mean(final_loss(task, lr, make, s, steps)[0] for s in range(seeds))
                for make in makes.values()
            ]
            rows.append([task, lr, *found])
    print(
        Table(
            ["task", "lr", *makes],
            rows,
            title=f"Digits, final loss after {steps} steps, momentum 0.9, mean of {seeds} seeds",
            formats=dict.fromkeys(makes, ".4f"),
        ).markdown()
    )


def hybrid(seeds: int, steps: int) -> None:
    rows = []
    for task, lr in (("autoencoder", 0.3), ("classifier", 0.1)):
        for seed in range(seeds):
            full, _ = final_loss(task, lr, lambda m, i: MKOR(m, i), seed, steps)
            half, optimizer = final_loss(task, lr, lambda m, i: MKORH(m, i), seed, steps)
            plain, _ = final_loss(task, lr, lambda m, i: i, seed, steps)
            at = optimizer.switched_at
            used = -(-(steps if at is None else at) // optimizer.inv_freq)
            rows.append([task, seed, plain, full, half, half / full, at, used, -(-steps // 10)])
    losses = ["SGD", "MKOR", "MKOR-H"]
    print(
        Table(
            ["task", "seed", *losses, "MKOR-H / MKOR", "switched at", "refreshes", "MKOR's"],
            rows,
            title=f"Digits, MKOR-H by the knee-point rule, {steps} steps",
            formats={**dict.fromkeys(losses, ".4f"), "MKOR-H / MKOR": ".3f"},
        ).markdown()
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["speed", "digits", "hybrid"])
    parser.add_argument("--official", help="folder of a clone of the official repository")
    parser.add_argument("--marks", type=int, nargs="+", default=[2, 10, 30, 100, 200, 300])
    parser.add_argument("--timed", type=int, default=7, help="normal steps timed at each mark")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--hybrid-steps", type=int, default=1_000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "speed": lambda: speed(args.official, sorted(args.marks), args.timed),
        "digits": lambda: claims(args.seeds, args.steps),
        "hybrid": lambda: hybrid(args.seeds, args.hybrid_steps),
    }
    for name, work in parts.items():
        if args.part in (None, name):
            work()
            print()


if __name__ == "__main__":
    main()
