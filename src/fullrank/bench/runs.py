"""Runs of a benchmark, kept one by one as they finish, so that a second start goes on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fullrank.core.errors import InputError, StoreError
from fullrank.core.locking import write_lock

Result = dict[str, Any]
"""What a run found, as JSON values."""

RUNS = "runs.jsonl"
# Results of other versions are other results.
_LIBRARIES = ("fullrank", "torch")


@dataclass(frozen=True)
class Job:
    """One run, by everything that its outcome depends on.

    Attributes
    ----------
    kind
        What is done.
    settings
        What it is done with: JSON values.
    label
        For people; no part of what the run is.

    Examples
    --------
    >>> Job("train", {"lr": 1, "seed": 0}).key == Job("train", {"seed": 0, "lr": 1}, "again").key
    True
    """

    kind: str
    settings: Mapping[str, Any]
    label: str = field(default="", compare=False)

    @cached_property
    def key(self) -> str:
        """A hash of kind, settings and the versions of fullrank and torch."""
        libraries = {name: version(name) for name in _LIBRARIES}
        text = json.dumps([self.kind, self.settings, libraries], sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()[:24]


class RunStore:
    """Finished runs in a folder, a line each in ``runs.jsonl``.

    A line is written and flushed to disk at once. One that a crash cut short is dropped, and its
    run made again. Of several lines for one run the last one counts.

    Parameters
    ----------
    folder
        A new folder, or one that such a store has made.

    Raises
    ------
    InputError
        When the folder holds something else.
    StoreError
        When a line is damaged.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "bench"
    >>> job = Job("train", {"seed": 0})
    >>> store = RunStore(folder)
    >>> with store.writing():
    ...     store.add(job, {"loss": 1.5}, seconds=2.0)
    >>> RunStore(folder).get(job)
    {'loss': 1.5}
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.path = self.folder / RUNS
        self._results: dict[str, Result] = {}
        self._end = 0
        if self.path.is_file():
            self._read()
        elif self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder} holds something else already; give a new folder")

    def __len__(self) -> int:
        return len(self._results)

    def __contains__(self, job: Job) -> bool:
        return job.key in self._results

    def get(self, job: Job) -> Result | None:
        """Return what a run found, or None where it is not finished."""
        return self._results.get(job.key)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Be the only process that adds runs; others are turned away with a ``LockedError``."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with write_lock(self.folder):
            # The folder is known again although its first run was given up.
            self.path.touch()
            # What another process finished in the meantime.
            self._read()
            yield

    def add(self, job: Job, result: Result, seconds: float) -> None:
        """Keep what a run found."""
        record = {
            "key": job.key,
            "kind": job.kind,
            "label": job.label,
            "result": result,
            "seconds": round(seconds, 3),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": {name: version(name) for name in _LIBRARIES},
            "machine": platform.machine(),
            "settings": job.settings,
        }
        line = json.dumps(record, allow_nan=False).encode() + b"\n"
        with self.path.open("r+b" if self.path.exists() else "xb") as file:
            # Over what a crash cut short.
            file.truncate(self._end)
            file.seek(self._end)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._end += len(line)
        self._results[job.key] = result

    def _read(self) -> None:
        data = self.path.read_bytes()
        *lines, cut_short = data.split(b"\n")
        self._end = len(data) - len(cut_short)
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._results[record["key"]] = record["result"]
            except (ValueError, KeyError, TypeError) as error:
                raise StoreError(
                    f"line {number} of {self.path} is damaged ({error}); remove that line, and "
                    "its run is made again"
                ) from error
