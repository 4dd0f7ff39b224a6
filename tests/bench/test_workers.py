"""Jobs in other processes: what is kept, what is not done twice, what becomes of failures."""

import os
import subprocess
import sys
import time
from pathlib import Path

import bench_jobs
import pytest
from bench_jobs import work

from fullrank.bench import Job, RunStore, run_jobs
from fullrank.core import InputError


@pytest.fixture
def store(tmp_path):
    return RunStore(tmp_path / "bench")


def jobs(*losses, kind="train", **more):
    return [Job(kind, {"loss": loss, **more}, f"run {loss}") for loss in losses]


def never(job):
    raise AssertionError("nothing is left to do")


def test_jobs_are_done_in_as_many_processes_as_asked_for(store):
    wanted = jobs(1, 2, 3, seconds=0.5)
    seen = []
    run_jobs(lambda _: wanted, work, store, workers=2, threads=1, advance=seen.append)
    found = [store.get(job) for job in wanted]
    assert [f["loss"] for f in found] == [1, 2, 3]
    assert len({f["process"] for f in found}) == 2
    assert {f["threads"] for f in found} == {1}
    assert seen == [1, 1, 1]
    # A second time nothing is started, not even a process.
    run_jobs(lambda _: wanted, never, store, workers=2)


def test_jobs_may_depend_on_what_was_found(store):
    first = jobs(3, 4)

    def due(known):
        if not all(job in known for job in first):
            return [*first, *first]  # named twice, done once
        best = min(known.get(job)["loss"] for job in first)
        return [*first, *jobs(10 * best)]

    run_jobs(due, work, store)
    assert len(store) == 3
    assert store.get(jobs(30)[0])["loss"] == 30


def test_again_does_each_job_once_more(store):
    (job,) = jobs(1)
    run_jobs(lambda _: [job], work, store)
    before = store.get(job)["process"]
    run_jobs(lambda _: [job], work, store, again=True)
    assert store.get(job)["process"] != before
    assert len(store.path.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("refuse", InputError, "run 2: this cannot be done"),
        ("break", RuntimeError, "run 2 failed:\n(.|\n)*ZeroDivisionError: a bug"),
        ("die", RuntimeError, "the process of run 2 died with exit code 3"),
    ],
)
def test_a_failure_ends_the_work_and_keeps_what_is_done(store, kind, error, message):
    wanted = [*jobs(1), *jobs(2, kind=kind), *jobs(3)]
    with pytest.raises(error, match=message):
        run_jobs(lambda _: wanted, work, store)
    assert [job in store for job in wanted] == [True, False, False]


def test_an_interruption_keeps_what_is_finished_and_frees_the_folder(store):
    def interrupt(_):
        raise KeyboardInterrupt

    wanted = [*jobs(1), *jobs(2, seconds=60)]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(lambda _: wanted, work, store, workers=2, advance=interrupt)
    again = RunStore(store.folder)
    assert [job in again for job in wanted] == [True, False]
    with again.writing():
        pass


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks processes up there")
def test_workers_end_with_who_started_them(store, tmp_path):
    pid = tmp_path / "pid"
    script = f"""
from bench_jobs import work
from fullrank.bench import Job, RunStore, run_jobs
wanted = [Job("train", {{"seconds": 100, "pid": {str(pid)!r}}}, "long")]
run_jobs(lambda _: wanted, work, RunStore({str(store.folder)!r}))
"""
    paths = os.pathsep.join([str(Path(bench_jobs.__file__).parent), *filter(None, sys.path)])
    started = subprocess.Popen(
        [sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": paths}
    )
    try:
        until(lambda: pid.exists() and pid.read_text())
        assert running(pid.read_text())
    finally:
        started.kill()
        started.wait()
    until(lambda: not running(pid.read_text()))


def until(happens, seconds=60):
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end
        time.sleep(0.05)


def running(pid):
    # What has ended stays listed where nobody asks for its exit code.
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_no_workers_is_an_error(store):
    with pytest.raises(InputError, match="workers=0"):
        run_jobs(lambda _: [], work, store, workers=0)
