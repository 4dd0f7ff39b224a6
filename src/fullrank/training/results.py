"""What a training run leaves: the model, its history, and the folder they are saved in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.core.errors import InputError, StoreError, require
from fullrank.core.files import atomic_write
from fullrank.spectra.run_log import EVENTS
from fullrank.training.checkpoints import CHECKPOINTS, check_identity
from fullrank.training.config import EncoderTraining
from fullrank.training.history import TrainingHistory
from fullrank.training.optimizers import StateMemory

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from fullrank.core.table import Table

RESULT = "training.json"
# Where a model is written before it is moved into place.
_SAVING = ".saving"
_VERSION = 1
_LIBRARIES = ("fullrank", "torch", "transformers", "sentence-transformers")


@dataclass(frozen=True)
class TrainedEncoder:
    """A fine-tuned encoder and how it came about.

    Attributes
    ----------
    model
        The ``SentenceTransformer`` with the best weights, in evaluation mode.
    history
        Loss curve, development metric and RankMe at each evaluation, speed.
    memory
        Peak bytes of the optimizer's state against AdamW's.
    config
        The settings.
    data
        Counts: pairs, queries, documents measured on.
    folder
        Where it is saved, or None.
    """

    model: SentenceTransformer
    history: TrainingHistory
    memory: StateMemory
    config: EncoderTraining
    data: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    def table(self) -> Table:
        """Return the evaluations as a table, whose title says what the metric was measured on."""
        table, data = self.history.table(), self.data
        if not data.get("dev_queries"):
            return table
        # A ranking of fewer documents is easier: without this the number reads as that of a system.
        ranked = (
            f"dev ranks {data['dev_documents']:,} of {data['documents']:,} documents, cut to "
            f"{self.config.dev_tokens} tokens, for {data['dev_queries']:,} queries"
        )
        return replace(table, title=f"{table.title}: {ranked}")

    def to_json(self) -> dict[str, Any]:
        """Return everything but the model as JSON values: what ``training.json`` holds."""
        best = self.history.best
        return {
            "version": _VERSION,
            "config": self.config.as_dict(),
            "data": self.data,
            "history": self.history.to_json(),
            "best": None if best is None else {"step": best.step, self.history.metric: best.metric},
            "gain": self.history.gain,
            "tokens_per_second": self.history.tokens_per_second,
            "memory": self.memory.to_json(),
            "versions": versions(),
        }


def checked_folder(folder: Path) -> Path:
    """Return a folder that is free, or that holds a run of ours; raise for any other."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a new folder")
    ours = any((folder / name).exists() for name in (RESULT, CHECKPOINTS, EVENTS, _SAVING))
    if folder.is_dir() and any(folder.iterdir()) and not ours:
        raise InputError(f"{folder} holds something else already; give a new folder")
    return folder


def load_result(folder: Path, identity: dict[str, Any], config: EncoderTraining) -> TrainedEncoder:
    """Load the encoder that was finished in a folder, if its run is this one."""
    library = require("sentence_transformers", extra="hf")
    history, memory, data = read_result(folder, identity)
    model = library.SentenceTransformer(str(folder), device=config.device)
    return TrainedEncoder(model, history, memory, config, data, folder)


def read_result(
    folder: Path, identity: dict[str, Any]
) -> tuple[TrainingHistory, StateMemory, dict[str, Any]]:
    """Read history, memory and data of the run that was finished in a folder.

    Raises
    ------
    InputError
        When it is another run.
    StoreError
        When the file is damaged.
    """
    try:
        values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        check_identity(values["identity"], identity, folder)
        history = TrainingHistory.from_json(values["history"])
        memory = StateMemory.from_json(values["memory"])
        return history, memory, values["data"]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise StoreError(
            f"{folder / RESULT} is damaged ({error}); train with resume=False"
        ) from error


def save_result(trained: TrainedEncoder, folder: Path, identity: dict[str, Any]) -> None:
    """Put the model in place file by file, then say that it is whole, then drop checkpoints."""

    def write(staging: Path) -> None:
        trained.model.save_pretrained(str(staging), create_model_card=False)

    put_in_place(folder, write, {**trained.to_json(), "identity": identity}, last="modules.json")


def put_in_place(
    folder: Path, write: Callable[[Path], None], values: dict[str, Any], last: str
) -> None:
    """Write a model aside, move it into its folder, say that it is whole, drop checkpoints.

    ``last`` is the file without which nothing loads the model.
    """
    (folder / RESULT).unlink(missing_ok=True)
    staging = folder / _SAVING
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write(staging)
    for path in sorted(staging.iterdir(), key=lambda p: p.name == last):
        target = folder / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    staging.rmdir()
    atomic_write(folder / RESULT, json.dumps(values, indent=1).encode())
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def versions() -> dict[str, str]:
    """Return the versions of what a run was made with."""
    return {name: _version(name) for name in _LIBRARIES}


def _version(library: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(library)
    except PackageNotFoundError:
        return ""
