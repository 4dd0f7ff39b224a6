"""Jobs in worker processes, each with few threads: many small runs at once, none lost."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from fullrank.bench.runs import Job, Result, RunStore
from fullrank.core.errors import FullrankError, InputError

Work = Callable[[Job], Result]
"""Does a job; a function of a module, since other processes import it."""
Due = Callable[[RunStore], Iterable[Job]]
"""Jobs that are wanted, given what is known; asked again whenever one is finished."""


def run_jobs(
    due: Due,
    work: Work,
    store: RunStore,
    *,
    workers: int = 1,
    threads: int = 1,
    again: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Do jobs until none is due that the store does not have.

    Parameters
    ----------
    due
        Which jobs are wanted. Later ones may depend on what earlier ones found.
    work
        Does a job, in another process.
    store
        Has what was finished before, and gets every result as it comes.
    workers, threads
        Processes at a time, and threads of torch in each.
    again
        Do what the store has once more, too.
    advance
        Told of each job that is finished.

    Raises
    ------
    InputError
        When a job cannot be done as it was asked for; those under way are finished first.
    RuntimeError
        When a job fails otherwise, with its traceback, or its process dies.
    LockedError
        When another process is adding runs.
    KeyboardInterrupt
        At once after Ctrl-C; jobs under way are given up.
    """
    if workers < 1 or threads < 1:
        raise InputError(f"workers={workers}, threads={threads}; both are at least 1")
    done: set[str] = set()
    with store.writing(), _Pool(work, workers, threads) as pool:
        while True:
            if pool.failure is None:
                settled = done | pool.keys
                waiting = [job for job in due(store) if job.key not in settled]
                pool.start([job for job in waiting if again or job not in store])
            if not pool.keys:
                break
            for job, result, seconds in pool.finished():
                store.add(job, result, seconds)
                done.add(job.key)
                advance(1)
        if pool.failure is not None:
            raise pool.failure


def checked_device(wanted: str | None) -> str:
    """Return where jobs compute: the CPU by default.

    Raises
    ------
    InputError
        For a device that is neither cpu nor cuda, or a GPU that is not there.
    """
    device = wanted or "cpu"
    if device not in ("cpu", "cuda"):
        raise InputError(f"device {device!r}; it is cpu or cuda")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise InputError("there is no GPU that torch can use; leave the device out for the CPU")
    return device


def workers_at_a_time(device: str, threads: int) -> int:
    """Return how many processes keep a device busy: a core a thread, one on a GPU."""
    return max(1, _cores() // threads) if device == "cpu" else 1


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Pool:
    """Processes that are started when there is something to do, and ended together."""

    def __init__(self, work: Work, workers: int, threads: int) -> None:
        # A fork would copy the threads' locks of this process, but not the threads.
        self._context = multiprocessing.get_context("spawn")
        self._work, self._most, self._threads = work, workers, threads
        self._workers: list[_Worker] = []
        self.failure: Exception | None = None

    @property
    def keys(self) -> set[str]:
        """Keys of the jobs under way."""
        return {worker.job.key for worker in self._workers if worker.job is not None}

    def start(self, jobs: list[Job]) -> None:
        """Give jobs, the first ones first, to whoever is free."""
        given: set[str] = set()
        for job in jobs:
            if job.key in given:
                continue
            free = [worker for worker in self._workers if worker.job is None]
            if not free and len(self._workers) == self._most:
                return
            worker = free[0] if free else self._another()
            worker.give(job)
            given.add(job.key)

    def finished(self) -> list[tuple[Job, Result, float]]:
        """Wait until at least one job has ended; return those that went well."""
        busy = {worker.pipe: worker for worker in self._workers if worker.job is not None}
        found = []
        for ready in wait(list(busy)):
            worker = busy[ready]
            outcome = worker.take()
            if isinstance(outcome.problem, Exception):
                self.failure = self.failure or outcome.problem
            else:
                found.append((outcome.job, outcome.result, outcome.seconds))
        return found

    def _another(self) -> _Worker:
        worker = _Worker(self._context, self._work, self._threads)
        self._workers.append(worker)
        return worker

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.end()


@dataclass(frozen=True)
class _Outcome:
    job: Job
    result: Result
    seconds: float
    problem: Exception | None = None


class _Worker:
    """A process, the pipe to it, and the job that it is doing."""

    def __init__(self, context: Any, work: Work, threads: int) -> None:
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, work, threads), daemon=True)
        self.process.start()
        theirs.close()
        self.job: Job | None = None

    def give(self, job: Job) -> None:
        """Send a job."""
        # One that has died is found out where its answer is awaited.
        with suppress(BrokenPipeError):
            self.pipe.send(job)
        self.job = job

    def take(self) -> _Outcome:
        """Receive what became of the job."""
        job, self.job = self.job, None
        assert job is not None
        try:
            result, seconds, refused, broken = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            return _Outcome(job, {}, 0.0, RuntimeError(_death(job, self.process.exitcode)))
        if refused is not None:
            return _Outcome(job, {}, seconds, InputError(f"{job.label}: {refused}"))
        if broken is not None:
            return _Outcome(job, {}, seconds, RuntimeError(f"{job.label} failed:\n{broken}"))
        return _Outcome(job, result, seconds)

    def end(self) -> None:
        """Stop the process, whatever it is doing."""
        self.pipe.close()
        self.process.terminate()
        self.process.join()


def _death(job: Job, code: int | None) -> str:
    why = "the system may have been out of memory" if code == -signal.SIGKILL else "see above"
    return f"the process of {job.label} died with exit code {code} ({why})"


def _end_with_parent() -> None:
    """Give the job up as soon as nobody is there to take it, as after a SIGTERM."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _serve(pipe: Connection, work: Work, threads: int) -> None:
    """Do what comes through the pipe until it is closed."""
    # Ctrl-C reaches all processes of a terminal; the one that started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    import torch

    torch.set_num_threads(threads)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        began = time.monotonic()
        result: Result = {}
        refused = broken = None
        try:
            result = work(job)
        except FullrankError as error:
            refused = str(error)
        except Exception:
            broken = traceback.format_exc()
        try:
            pipe.send((result, time.monotonic() - began, refused, broken))
        except BrokenPipeError:
            return
