"""`fullrank bench shrink`: every shrinking method on the same models, at the same sizes."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path

from fullrank.bench import shrink_jobs
from fullrank.bench.runs import Job, RunStore
from fullrank.bench.shrink_entrants import Entrant, chosen_entrants
from fullrank.bench.shrink_plot import quality_against_size
from fullrank.bench.shrink_sizes import ShrinkSize, shrink_size
from fullrank.bench.shrink_subjects import chosen_subjects
from fullrank.bench.shrink_table import Comparison, rows_of
from fullrank.bench.workers import run_jobs
from fullrank.core.files import atomic_write
from fullrank.core.progress import progress as progress_bar


def bench_shrink(
    out: str | Path,
    *,
    size: str | ShrinkSize = "full",
    subjects: Sequence[str] | None = None,
    methods: Sequence[str] | None = None,
    workers: int = 1,
    threads: int = 1,
    progress: bool = True,
) -> Comparison:
    """Shrink the same trained models by every method to the same sizes, and compare.

    Each method makes a model of each share of the layers' parameters, in one shot where it can;
    then each is trained for the same steps, as the method has it. Every model is measured:
    quality with intervals, parameters, bytes, operations, speed beside the original in float32
    and bfloat16. Every run is kept as it finishes: the same call goes on where an earlier one was
    stopped.

    Parameters
    ----------
    out
        Folder of the results: ``runs.jsonl``, ``shrink.md``, ``shrink.json``, the trained models
        and, where matplotlib is installed, a picture for each model.
    size
        ``"quick"``, ``"full"`` or a :class:`~fullrank.bench.shrink_sizes.ShrinkSize`.
    subjects
        What is shrunk: names of :data:`~fullrank.bench.shrink_subjects.SUBJECTS`; all by default.
    methods
        Names of :data:`~fullrank.bench.shrink_entrants.ENTRANTS`; all by default.
    workers, threads
        Processes at a time, and threads of each.
    progress
        Show a bar with the time left.

    Returns
    -------
    Comparison
        A table for each subject.

    Raises
    ------
    InputError
        For unknown names, data that is not there, a folder that holds something else.
    LockedError
        When another process is adding runs to the folder.
    KeyboardInterrupt
        After Ctrl-C; finished runs are kept.

    Examples
    --------
    >>> bench_shrink("bench", size="quick", subjects=["cifar10"])  # doctest: +SKIP
    """
    chosen = size if isinstance(size, ShrinkSize) else shrink_size(size)
    store = RunStore(out)
    bench = _Bench(chosen, chosen_subjects(subjects), chosen_entrants(methods))
    work = functools.partial(shrink_jobs.work, folder=str(store.folder))
    jobs = bench.total
    with progress_bar("shrink", jobs, progress, unit="runs") as advance:
        advance(jobs - bench.missing(store))
        run_jobs(bench.due, work, store, workers=workers, threads=threads, advance=advance)
    found = bench.comparison(store)
    _write(found, store.folder)
    return found


class _Bench:
    """All jobs of a comparison, and what their results say."""

    def __init__(
        self, size: ShrinkSize, subjects: Sequence[str], entrants: Sequence[Entrant]
    ) -> None:
        self.size = size
        self.originals = {name: shrink_jobs.original_job(name, size) for name in subjects}
        self.runs: dict[str, dict[tuple[str, float], Job]] = {
            name: {
                (entrant.label, share): shrink_jobs.shrink_job(name, entrant, share, size)
                for entrant in entrants
                for share in size.shares
            }
            for name in subjects
        }

    @property
    def total(self) -> int:
        """How many jobs there are."""
        return len(self.originals) + sum(map(len, self.runs.values()))

    def missing(self, store: RunStore) -> int:
        """How many of them are not finished."""
        jobs = [
            *self.originals.values(),
            *(j for runs in self.runs.values() for j in runs.values()),
        ]
        return sum(job not in store for job in jobs)

    def due(self, store: RunStore) -> list[Job]:
        """Originals first: they are trained once, and what comes after reads them."""
        jobs = []
        for name, original in self.originals.items():
            jobs.append(original)
            if original in store:
                jobs += self.runs[name].values()
        return jobs

    def comparison(self, store: RunStore) -> Comparison:
        """Put together what the finished runs found."""
        originals = {name: store.get(job) or {} for name, job in self.originals.items()}
        rows = {
            name: rows_of(originals[name], {key: store.get(job) or {} for key, job in runs.items()})
            for name, runs in self.runs.items()
        }
        return Comparison(self.size, originals, rows)


def _write(found: Comparison, folder: Path) -> None:
    atomic_write(folder / "shrink.md", (found.markdown() + "\n").encode())
    atomic_write(folder / "shrink.json", json.dumps(found.to_json(), indent=1).encode())
    if importlib.util.find_spec("matplotlib") is None:
        return
    for name, rows in found.rows.items():
        metric = found.originals[name]["metric"]
        picture = quality_against_size(rows, f"{name}, size {found.size.name}", metric)
        atomic_write(folder / f"{name}.svg", picture)
