"""Checkpoints appear whole, the newest wins, damage is told."""

import json

import pytest
import torch

from fullrank.core import InputError, StoreError
from fullrank.training.checkpoints import (
    Progress,
    check_identity,
    newest,
    publish,
    read_progress,
    write_progress,
)
from fullrank.training.history import EvaluationRecord, StepRecord, TrainingHistory


def progress():
    history = TrainingHistory(
        "nDCG@10",
        [StepRecord(1, 2.0, 1e-5, 0.5, 1.0, 100)],
        [EvaluationRecord(0, 0.3, 20.0, 0.0, 0.5)],
    )
    return Progress({"config": {"lr": 1}}, 12.5, 100, 4096, 3, 0.4, history)


def written(folder, step=5):
    staging = folder / ".writing" / f"checkpoint-{step}"
    staging.mkdir(parents=True)
    for name in ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (staging / name).write_text("{}")
    write_progress(staging, progress(), {"w": torch.arange(3.0)})
    publish(staging, folder / f"checkpoint-{step}")
    return folder / f"checkpoint-{step}"


def test_round_trip(tmp_path):
    found, best = read_progress(written(tmp_path))
    assert found == progress()
    assert torch.equal(best["w"], torch.arange(3.0))


def test_the_newest_replaces_those_before(tmp_path):
    assert newest(tmp_path / "none") is None
    assert newest(tmp_path) is None
    written(tmp_path, 9)
    (tmp_path / ".writing").rmdir()
    written(tmp_path, 10)
    assert newest(tmp_path) == tmp_path / "checkpoint-10"
    assert not (tmp_path / "checkpoint-9").exists()


def test_what_was_being_written_is_no_checkpoint(tmp_path):
    (tmp_path / ".writing-7" / "checkpoint-7").mkdir(parents=True)
    assert newest(tmp_path) is None


def test_missing_file(tmp_path):
    folder = written(tmp_path)
    (folder / "optimizer.pt").unlink()
    with pytest.raises(StoreError, match=r"optimizer.pt is missing.*resume=False"):
        read_progress(folder)


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"version": 1}'])
def test_damaged_progress(tmp_path, damage):
    folder = written(tmp_path)
    (folder / "progress.json").write_text(damage)
    with pytest.raises(StoreError, match="damaged"):
        read_progress(folder)


def test_damaged_weights(tmp_path):
    folder = written(tmp_path)
    (folder / "best.safetensors").write_bytes(b"123")
    with pytest.raises(StoreError, match="damaged"):
        read_progress(folder)


def test_newer_version(tmp_path):
    folder = written(tmp_path)
    values = json.loads((folder / "progress.json").read_text())
    (folder / "progress.json").write_text(json.dumps({**values, "version": 99}))
    with pytest.raises(StoreError, match="newer fullrank"):
        read_progress(folder)


def test_identity_names_what_differs(tmp_path):
    wanted = {"config": {"lr": 1, "rank": 2}, "model": "a", "data": "b"}
    check_identity(wanted, dict(wanted), tmp_path)
    with pytest.raises(InputError, match="another rank, data"):
        check_identity({**wanted, "config": {"lr": 1, "rank": 3}, "data": "c"}, wanted, tmp_path)
