"""`fullrank bench optimizers`: every optimizer on the same models, texts, steps and seeds."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fullrank.bench import lm_jobs
from fullrank.bench.entrants import Entrant, chosen_entrants
from fullrank.bench.leaderboard import Found, Leaderboard, rows_of
from fullrank.bench.plot import loss_against_state
from fullrank.bench.runs import Job, Result, RunStore
from fullrank.bench.search import RateSearch, run_searches
from fullrank.bench.sizes import Size, size_of
from fullrank.bench.workers import checked_device, run_jobs
from fullrank.core.errors import InputError
from fullrank.core.files import atomic_write
from fullrank.core.progress import progress as progress_bar
from fullrank.datasets.texts import Texts, read_texts

TEXTS = ("tinyshakespeare", "python_source")
"""What the leaderboard is measured on by default."""


def bench_optimizers(
    out: str | Path,
    *,
    size: str | Size = "tiny",
    texts: Sequence[str] = TEXTS,
    optimizers: Sequence[str] | None = None,
    workers: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    remeasure: bool = False,
    progress: bool = True,
) -> Leaderboard:
    """Train the same language models with every optimizer, and compare loss, memory and time.

    Each optimizer is tried at an equally large grid of learning rates on one seed, then at its
    best rate on more seeds. The learning rate of the blocks' matrices is the grid's; that of all
    else (embeddings, output head, norms) is 4 times as high for all. Times are measured apart
    from training, in turns, in one process; peak memory too. Every run is kept as it finishes:
    the same call goes on where an earlier one was stopped.

    Parameters
    ----------
    out
        Folder of the results: ``runs.jsonl``, ``leaderboard.md``, ``leaderboard.json`` and, where
        matplotlib is installed, a picture for each text.
    size
        ``"tiny"`` (width 96, 2 layers, 3,000 steps), ``"small"``, ``"base"`` (for a GPU), or a
        :class:`Size`.
    texts
        What is trained on; see :func:`~fullrank.datasets.texts.read_texts`.
    optimizers
        Names of :data:`~fullrank.bench.entrants.ENTRANTS`; all by default.
    workers, threads
        Processes that train at a time, and threads of each. By default one thread, and as many
        processes as there are cores, or one process on a GPU.
    device
        ``"cpu"`` or ``"cuda"``; None takes the CPU.
    remeasure
        Measure times and memory anew, say because the machine was busy.
    progress
        Show a bar with the time left.

    Returns
    -------
    Leaderboard
        A table for each text.

    Raises
    ------
    InputError
        For unknown names, texts that are not there, a folder that holds something else.
    LockedError
        When another process is adding runs to the folder.
    KeyboardInterrupt
        After Ctrl-C; finished runs are kept.

    Examples
    --------
    >>> bench_optimizers("bench", size="tiny", optimizers=["AdamW", "Muon"])  # doctest: +SKIP
    """
    store = RunStore(out)
    chosen = size if isinstance(size, Size) else size_of(size)
    bench = _Bench(chosen, chosen_entrants(optimizers), texts, checked_device(device))
    bench.measure(store, remeasure, progress)
    bench.train(store, workers, threads, progress)
    board = bench.leaderboard(store)
    _write(board, store.folder)
    return board


class _Bench:
    """All jobs of a leaderboard, and what their results say."""

    def __init__(
        self, size: Size, entrants: Sequence[Entrant], sources: Sequence[str], device: str
    ) -> None:
        self.size, self.entrants, self.device = size, entrants, device
        self.time = lm_jobs.time_job(size, entrants, device)
        self.memory = {e.label: lm_jobs.memory_job(size, e, device) for e in entrants}
        self.manifests: dict[str, dict[str, Any]] = {}
        self.searches: dict[tuple[str, str], RateSearch] = {}
        for source in sources:
            texts = read_texts(source)
            if texts.name in self.manifests:
                raise InputError(f"two texts are named {texts.name}; give each another name")
            self.manifests[texts.name] = {**texts.manifest, "sha256": texts.fingerprint}
            for entrant in entrants:
                self.searches[texts.name, entrant.label] = self._search(entrant, texts, source)

    def _search(self, entrant: Entrant, texts: Texts, source: str) -> RateSearch:
        def job(lr: float, seed: int) -> Job:
            return lm_jobs.train_job(self.size, entrant, lr, seed, texts, source, self.device)

        return RateSearch(entrant.rates(self.size.rates), tuple(range(self.size.seeds)), job)

    def measure(self, store: RunStore, again: bool, progress: bool) -> None:
        """Measure times, then memory, with nothing else going on."""
        jobs = [self.time, *self.memory.values()]
        with progress_bar("measure", len(jobs), progress, unit="jobs") as advance:
            run_jobs(lambda _: jobs, lm_jobs.work, store, again=again, advance=advance)

    def train(
        self, store: RunStore, workers: int | None, threads: int | None, progress: bool
    ) -> None:
        """Train what has not been trained yet."""
        searches = list(self.searches.values())
        run_searches(
            searches,
            lm_jobs.work,
            store,
            workers=workers,
            threads=threads,
            device=self.device,
            progress=progress,
        )

    def leaderboard(self, store: RunStore) -> Leaderboard:
        """Put together what the finished runs found."""
        times = store.get(self.time) or {}
        rows = {
            text: rows_of([self._found(text, e, store, times.get(e.label)) for e in self.entrants])
            for text in self.manifests
        }
        return Leaderboard(self.size, rows, self.manifests, self.device)

    def _found(self, text: str, entrant: Entrant, store: RunStore, time: Result | None) -> Found:
        search = self.searches[text, entrant.label]
        note = "edge" if search.at_edge(store) else ""
        return Found(
            entrant.label,
            search.best(store),
            search.runs(store),
            "diverged at every rate" if search.diverged(store) else note,
            time,
            store.get(self.memory[entrant.label]),
        )


def _write(board: Leaderboard, folder: Path) -> None:
    atomic_write(folder / "leaderboard.md", (board.markdown() + "\n").encode())
    atomic_write(folder / "leaderboard.json", json.dumps(board.to_json(), indent=1).encode())
    if importlib.util.find_spec("matplotlib") is None:
        return
    for text, rows in board.rows.items():
        picture = loss_against_state(rows, f"{text}, size {board.size.name}")
        atomic_write(folder / f"{text}.svg", picture)
