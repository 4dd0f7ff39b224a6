"""The runs behind one row of a leaderboard: a grid of rates on one seed, the best one on more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fullrank.bench.runs import Job, Result, RunStore
from fullrank.bench.workers import Work, run_jobs, workers_at_a_time
from fullrank.core.progress import progress as progress_bar


@dataclass(frozen=True)
class RateSearch:
    """Every rate on the first seed, then the best rate on the other seeds.

    A run's result has its score, lower is better, or None where it diverged.

    Attributes
    ----------
    rates
        The grid, in ascending order.
    seeds
        The first one is the grid's.
    job
        The run of a rate and a seed.
    score
        Key of the score in a result.

    Examples
    --------
    >>> search = RateSearch((0.1, 0.3), (0, 1), lambda lr, seed: Job("x", {"lr": lr, "seed": seed}))
    >>> search.total
    3
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    job: Callable[[float, int], Job]
    score: str = "loss"

    @property
    def total(self) -> int:
        """Runs when all is done."""
        return len(self.rates) + len(self.seeds) - 1

    def due(self, store: RunStore) -> list[Job]:
        """Return the runs that can be made by now, finished ones among them."""
        grid = [self.job(rate, self.seeds[0]) for rate in self.rates]
        best = self.best(store)
        return grid + ([] if best is None else [self.job(best, seed) for seed in self.seeds[1:]])

    def finished(self, store: RunStore) -> int:
        """Return how many of the runs there are; those that need none count as made."""
        made = sum(job in store for job in self.due(store))
        gone = len(self.seeds) - 1 if self.diverged(store) else 0
        return made + gone

    def best(self, store: RunStore) -> float | None:
        """Return the rate of the lowest score; None before the grid is done, or if all diverged."""
        found = self._grid(store)
        if found is None:
            return None
        losses = {
            rate: result[self.score]
            for rate, result in zip(self.rates, found, strict=True)
            if result[self.score] is not None
        }
        return min(losses, key=lambda rate: losses[rate]) if losses else None

    def diverged(self, store: RunStore) -> bool:
        """Whether the grid is done and no rate worked."""
        found = self._grid(store)
        return found is not None and all(result[self.score] is None for result in found)

    def at_edge(self, store: RunStore) -> bool:
        """Whether the best rate is the first or the last of the grid: one outside may be better."""
        ends = (self.rates[0], self.rates[-1])
        return len(self.rates) > 1 and self.best(store) in ends

    def runs(self, store: RunStore) -> list[Result]:
        """Return what the finished runs at the best rate found, one a seed, diverged ones too."""
        best = self.best(store)
        if best is None:
            return []
        found = [store.get(self.job(best, seed)) for seed in self.seeds]
        return [result for result in found if result is not None]

    def _grid(self, store: RunStore) -> list[Result] | None:
        found = [store.get(self.job(rate, self.seeds[0])) for rate in self.rates]
        done = [result for result in found if result is not None]
        return done if len(done) == len(found) else None


def run_searches(
    searches: Sequence[RateSearch],
    work: Work,
    store: RunStore,
    *,
    workers: int | None,
    threads: int | None,
    device: str,
    progress: bool,
    name: str = "train",
) -> None:
    """Make the runs of several searches that have not been made yet, with a bar.

    ``workers`` and ``threads`` are those of :func:`~fullrank.bench.workers.run_jobs`; None takes
    one thread each, and as many processes as keep the device busy.
    """
    threads = threads or 1

    def due(store: RunStore) -> list[Job]:
        return [job for search in searches for job in search.due(store)]

    total = sum(search.total for search in searches)
    with progress_bar(name, total, progress, unit="runs") as advance:
        advance(sum(search.finished(store) for search in searches))
        run_jobs(
            due,
            work,
            store,
            workers=workers or workers_at_a_time(device, threads),
            threads=threads,
            advance=advance,
        )
