"""Kept runs: what makes two runs the same, and what a crash leaves."""

import json

import pytest

from fullrank.bench import Job, RunStore
from fullrank.core import InputError, LockedError, StoreError

ONE, TWO = Job("train", {"lr": 0.1, "seed": 0}, "one"), Job("train", {"lr": 0.1, "seed": 1}, "two")


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "bench"
    store = RunStore(folder)
    with store.writing():
        store.add(ONE, {"loss": 1.0}, seconds=3.0)
        store.add(TWO, {"loss": 2.0}, seconds=4.0)
    return folder


def test_runs_are_there_after_another_start(folder):
    store = RunStore(folder)
    assert store.get(ONE) == {"loss": 1.0}
    assert TWO in store
    assert len(store) == 2
    assert Job("time", ONE.settings) not in store
    assert Job("train", {**ONE.settings, "lr": 0.2}) not in store


def test_a_line_says_what_was_run(folder):
    first = json.loads((folder / "runs.jsonl").read_text().splitlines()[0])
    assert first["settings"] == {"lr": 0.1, "seed": 0}
    assert (first["label"], first["kind"], first["seconds"]) == ("one", "train", 3.0)
    assert set(first["versions"]) == {"fullrank", "torch"}


def test_results_of_another_version_are_made_again(folder, monkeypatch):
    monkeypatch.setattr("fullrank.bench.runs.version", lambda _: "99")
    assert Job("train", {"lr": 0.1, "seed": 0}) not in RunStore(folder)


@pytest.mark.parametrize("kept", [1, 10, -1])
def test_what_a_crash_cut_short_is_dropped_and_written_over(folder, kept):
    path = folder / "runs.jsonl"
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:kept])
    store = RunStore(folder)
    assert ONE in store
    assert TWO not in store
    with store.writing():
        store.add(TWO, {"loss": 5.0}, seconds=1.0)
    assert len(path.read_text().splitlines()) == 2
    assert RunStore(folder).get(TWO) == {"loss": 5.0}


def test_the_last_of_several_lines_counts(folder):
    store = RunStore(folder)
    with store.writing():
        store.add(ONE, {"loss": 0.5}, seconds=1.0)
    assert store.get(ONE) == RunStore(folder).get(ONE) == {"loss": 0.5}


def test_a_damaged_line_is_named(folder):
    path = folder / "runs.jsonl"
    path.write_text("{}\n" + path.read_text())
    with pytest.raises(StoreError, match=r"line 1 of .* is damaged"):
        RunStore(folder)


def test_a_result_that_is_no_number_is_refused_and_nothing_is_written(folder):
    before = (folder / "runs.jsonl").read_bytes()
    store = RunStore(folder)
    with store.writing(), pytest.raises(ValueError, match="not JSON compliant"):
        store.add(Job("train", {}), {"loss": float("nan")}, seconds=1.0)
    assert (folder / "runs.jsonl").read_bytes() == before


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        RunStore(tmp_path)
    with pytest.raises(InputError, match="holds something else"):
        RunStore(tmp_path / "thesis.txt")


def test_a_second_writer_is_turned_away_and_sees_what_the_first_one_added(folder):
    store, other = RunStore(folder), RunStore(folder)
    with store.writing():
        with pytest.raises(LockedError), other.writing():
            pass
        store.add(Job("train", {"seed": 2}), {"loss": 3.0}, seconds=1.0)
    with other.writing():
        assert len(other) == 3


def test_a_folder_whose_first_run_was_cut_short_is_gone_on_with(tmp_path):
    store = RunStore(tmp_path / "bench")
    with store.writing():
        (store.folder / "model.safetensors").write_bytes(b"half a run's work")
    again = RunStore(store.folder)
    with again.writing():
        again.add(ONE, {"loss": 1.5}, seconds=1.0)
    assert RunStore(store.folder).get(ONE) == {"loss": 1.5}
