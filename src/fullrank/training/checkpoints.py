"""Checkpoints of a training run: whole or not there, loadable without unpickling code."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fullrank.core.errors import InputError, StoreError
from fullrank.core.files import sync_folder
from fullrank.training.history import TrainingHistory

CHECKPOINTS = "checkpoints"
"""Folder of the checkpoints, inside that of the run."""

_VERSION = 1
_PROGRESS = "progress.json"
_BEST = "best.safetensors"
_NAME = re.compile(r"checkpoint-(\d+)")
# What the trainer needs to go on as if nothing had happened.
_NEEDED = (_PROGRESS, "trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state*.pth")


@dataclass(frozen=True)
class Progress:
    """How far a run had come when a checkpoint was written.

    Attributes
    ----------
    identity
        Settings, data and model: what must not differ when it goes on.
    elapsed, tokens, peak
        Seconds used, tokens seen, most bytes of optimizer state so far.
    evaluations, next_share
        How often the run is evaluated, and the share of it at which that is due next.
    history
        Everything recorded so far.
    """

    identity: dict[str, Any]
    elapsed: float
    tokens: int
    peak: int
    evaluations: int
    next_share: float
    history: TrainingHistory


def write_progress(folder: Path, progress: Progress, best: dict[str, Tensor]) -> None:
    """Write our part of a checkpoint: progress, and the best weights so far."""
    values = {
        "version": _VERSION,
        "identity": progress.identity,
        "elapsed": progress.elapsed,
        "tokens": progress.tokens,
        "peak": progress.peak,
        "evaluations": progress.evaluations,
        "next_share": progress.next_share,
        "history": progress.history.to_json(),
    }
    (folder / _PROGRESS).write_text(json.dumps(values), encoding="utf-8")
    if best:
        save_file(best, folder / _BEST)


def publish(written: Path, final: Path) -> None:
    """Move a complete checkpoint into place, then remove those before it."""
    for path in sorted(written.rglob("*")):
        if path.is_file():
            with path.open("rb+") as file:
                os.fsync(file.fileno())
    shutil.rmtree(final, ignore_errors=True)
    written.replace(final)
    sync_folder(final.parent)
    for old in final.parent.iterdir():
        if old != final and _NAME.fullmatch(old.name):
            shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path) -> Path | None:
    """Return the checkpoint of most steps in a folder, or None."""
    if not folder.is_dir():
        return None
    found = {int(m[1]): p for p in folder.iterdir() if (m := _NAME.fullmatch(p.name))}
    return found[max(found)] if found else None


def read_progress(checkpoint: Path) -> tuple[Progress, dict[str, Tensor]]:
    """Read our part of a checkpoint.

    Raises
    ------
    StoreError
        When files are missing or damaged, or were written by a newer version.
    """
    advice = "remove the folder 'checkpoints' in it, or train with resume=False, to start again"
    missing = [name for name in _NEEDED if not any(checkpoint.glob(name))]
    if missing:
        raise StoreError(f"{checkpoint} is no whole checkpoint: {missing[0]} is missing; {advice}")
    try:
        values = json.loads((checkpoint / _PROGRESS).read_text(encoding="utf-8"))
        if values["version"] > _VERSION:
            raise StoreError(
                f"{checkpoint} was written by a newer fullrank (format {values['version']}, this "
                f"one reads up to {_VERSION}); update fullrank, or {advice}"
            )
        progress = Progress(
            identity=values["identity"],
            elapsed=values["elapsed"],
            tokens=values["tokens"],
            peak=values["peak"],
            evaluations=values["evaluations"],
            next_share=values["next_share"],
            history=TrainingHistory.from_json(values["history"]),
        )
        best = load_file(checkpoint / _BEST) if (checkpoint / _BEST).is_file() else {}
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"{checkpoint} is damaged ({error}); {advice}") from error
    return progress, best


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a model's weights: what tells one start of a run from another."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_identity(found: dict[str, Any], wanted: dict[str, Any], where: Path) -> None:
    """Raise unless a run in a folder is the one that is asked for.

    >>> check_identity({"config": {"lr": 1}}, {"config": {"lr": 2}}, Path("out"))
    Traceback (most recent call last):
        ...
    fullrank.core.errors.InputError: out holds a run with another lr; give a new folder, or ...
    """
    differs = [
        name
        for name in wanted["config"]
        if found.get("config", {}).get(name) != wanted["config"][name]
    ]
    others = [name for name in {**wanted, **found} if name != "config"]
    differs += [name for name in others if found.get(name) != wanted.get(name)]
    if differs:
        raise InputError(
            f"{where} holds a run with another {', '.join(differs)}; give a new folder, or "
            "resume=False (--fresh) to train again in this one"
        )
