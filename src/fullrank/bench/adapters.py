"""`fullrank bench adapters`: every adapter on the same bases, data, steps, rates and seeds."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from fullrank.bench import adapter_jobs
from fullrank.bench.adapter_board import AdapterBoard, AdapterRow, adapter_row
from fullrank.bench.adapter_entrants import Tuning, chosen_tunings
from fullrank.bench.adapter_scenes import SCENES
from fullrank.bench.adapter_sizes import TASKS, AdapterSize, adapter_size
from fullrank.bench.plot import Point, scatter
from fullrank.bench.runs import Job, RunStore
from fullrank.bench.search import RateSearch, run_searches
from fullrank.bench.workers import checked_device, run_jobs
from fullrank.core.errors import InputError, require
from fullrank.core.files import atomic_write
from fullrank.core.progress import progress as progress_bar

BASES = "bases"
"""Folder, beside the results, of what is trained before it is fine-tuned."""


def bench_adapters(
    out: str | Path,
    *,
    tasks: Sequence[str | AdapterSize] = TASKS,
    methods: Sequence[str] | None = None,
    workers: int | None = None,
    threads: int | None = None,
    device: str | None = None,
    remeasure: bool = False,
    progress: bool = True,
) -> dict[str, AdapterBoard]:
    """Fine-tune the same bases in every way, and compare quality, sizes, memory and time.

    Each way is tried at the same grid of learning rates on one seed, then at its best rate, by
    the dev part, on more seeds. Sizes, memory and times are measured apart from training. Every
    run is kept as it finishes: the same call goes on where an earlier one was stopped.

    Parameters
    ----------
    out
        Folder of the results: ``runs.jsonl``, ``TASK.md``, ``TASK.json``, the bases that were
        trained and, where matplotlib is installed, a picture ``TASK.svg`` for each task.
    tasks
        Of ``"digits"`` (an MLP to turned digits), ``"retrieval"`` (the embedded encoder to pydocs;
        what it forgets on Vaswani and Cranfield) and ``"language"`` (a language model of Python
        source to GSM8K), in their default size; or sizes.
    methods
        Methods of :func:`~fullrank.adapters.adapt`, ``"lora_pro"`` and ``"full"``; all by default.
    workers, threads, device, remeasure, progress
        As :func:`~fullrank.bench.bench_optimizers`.

    Returns
    -------
    dict
        Task -> its table.

    Raises
    ------
    InputError
        For unknown names, data that are not there, a folder that holds something else.
    LockedError
        When another process is adding runs to the folder.
    KeyboardInterrupt
        After Ctrl-C; finished runs are kept.

    Examples
    --------
    >>> bench_adapters("bench", tasks=["digits"], methods=["lora", "eva"])  # doctest: +SKIP
    """
    for library in ("peft", "transformers", "accelerate"):
        require(library, extra="adapters")
    sizes = [adapter_size(task) if isinstance(task, str) else task for task in tasks]
    if len({size.task for size in sizes}) < len(sizes):
        raise InputError(f"a task is named twice: {', '.join(size.task for size in sizes)}")
    ways, place = chosen_tunings(methods), checked_device(device)
    store = RunStore(out)
    # Data that are not there are found out before the first run.
    benches = [_Bench(size, ways, place, store) for size in sizes]
    boards = {}
    for bench in benches:
        bench.measure(remeasure, progress)
        bench.train(workers, threads, progress)
        boards[bench.size.task] = board = bench.board()
        _write(board, store.folder)
    return boards


class _Bench:
    """All jobs of a task, and what their results say."""

    def __init__(
        self, size: AdapterSize, ways: Sequence[Tuning], device: str, store: RunStore
    ) -> None:
        self.size, self.ways, self.device, self.store = size, ways, device, store
        home = (store.folder / BASES).resolve()
        self._work = functools.partial(adapter_jobs.work, home)
        self._scene = SCENES[size.task](size, home)
        self._jobs = jobs = adapter_jobs.Jobs(self._scene, device)
        self._base, self._time = jobs.base(), jobs.time(ways)
        self._starts = {way.name: jobs.start(way) for way in ways}
        self._searches = {way.name: self._search(way) for way in ways}

    def _search(self, way: Tuning) -> RateSearch:
        return RateSearch(
            self.size.rates,
            tuple(range(self.size.seeds)),
            functools.partial(self._jobs.tune, way),
            score="score",
        )

    def measure(self, again: bool, progress: bool) -> None:
        """Make the base, then measure it, starts, sizes, memory and times, one after another.

        Again where the base has been removed.
        """
        others = [self._time, *self._starts.values()]

        def due(store: RunStore) -> list[Job]:
            return [self._base, *(others if self._scene.ready else [])]

        again = again or not self._scene.ready
        name = f"{self.size.task}: measure"
        with progress_bar(name, 1 + len(others), progress, unit="jobs") as advance:
            run_jobs(due, self._work, self.store, again=again, advance=advance)

    def train(self, workers: int | None, threads: int | None, progress: bool) -> None:
        """Fine-tune what has not been yet."""
        run_searches(
            list(self._searches.values()),
            self._work,
            self.store,
            workers=workers,
            threads=threads,
            device=self.device,
            progress=progress,
            name=f"{self.size.task}: train",
        )

    def board(self) -> AdapterBoard:
        """Put together what the finished runs found."""
        times = self.store.get(self._time) or {}
        base = self.store.get(self._base) or {}
        rows = [self._row(way, times) for way in self.ways]
        measures = self._scene.measures
        return AdapterBoard(self.size, measures, base.get("measures", ()), rows, self.device)

    def _row(self, way: Tuning, times: dict[str, dict[str, float]]) -> AdapterRow:
        search, store = self._searches[way.name], self.store
        note = "edge" if search.at_edge(store) else ""
        return adapter_row(
            way.name,
            way.title,
            search.best(store),
            "diverged at every rate" if search.diverged(store) else note,
            search.runs(store),
            store.get(self._starts[way.name]),
            times.get(way.name),
        )


def _write(board: AdapterBoard, folder: Path) -> None:
    task = board.size.task
    atomic_write(folder / f"{task}.md", (board.markdown() + "\n").encode())
    atomic_write(folder / f"{task}.json", json.dumps(board.to_json(), indent=1).encode())
    if importlib.util.find_spec("matplotlib") is not None:
        atomic_write(folder / f"{task}.svg", picture(board))


def picture(board: AdapterBoard) -> bytes:
    """Draw the first measure over the trained parameters, as SVG."""
    points = [
        Point(row.trained, row.means[0], row.spreads[0] if row.spreads else 0.0, row.title)
        for row in board.ranked
        if row.means and row.trained
    ]
    title = f"{board.size.task}, {board.size.name} size"
    return scatter(points, title, ("trained parameters", board.measures[0].name), log=True)
