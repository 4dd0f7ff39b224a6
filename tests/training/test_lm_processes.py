"""Language-model training in two processes: what one does with batches twice as large."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fullrank.core.errors import InputError
from fullrank.training import LMTraining, train_lm
from fullrank.training.processes import Processes, SharedClock

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

WORKER = Path(__file__).with_name("lm_worker.py")
SETTINGS = {
    "model": {
        "config": {
            "model_type": "llama",
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 32,
        }
    },
    "data": {"context": 16},
    "optimizer": {"name": "galore_adamw", "lr": 3e-3, "rank": 4, "options": {"update_proj_gap": 5}},
    "loop": {"steps": 12, "batch_size": 2, "evaluations": 3, "device": "cpu"},
}


def settings(folder, **loop):
    path = folder / "run.json"
    path.write_text(json.dumps({**SETTINGS, "loop": {**SETTINGS["loop"], **loop}}))
    return str(path)


def launch(folder, *arguments, processes=2):
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(WORKER), str(folder), *arguments], capture_output=True, timeout=280
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]


def found(folder, rank=0):
    return torch.load(folder / f"found-{rank}.pt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run of two processes from start to end."""
    folder = tmp_path_factory.mktemp("whole")
    launch(folder, settings(folder))
    return folder


@pytest.mark.slow
def test_two_processes_train_as_one_with_batches_twice_as_large(tmp_path, whole):
    one, two = tmp_path, whole
    launch(one, settings(one, batch_size=4), processes=1)
    first, second, other = found(one), found(two), found(two, rank=1)
    torch.testing.assert_close(second["losses"], first["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second["metrics"], first["metrics"], rtol=1e-4, atol=1e-5)
    assert second["tokens"] == first["tokens"] == 12 * 4 * 15
    assert second["metrics"] == other["metrics"]
    assert first["metrics"][-1] < first["metrics"][0]
    for name, weight in second["weights"].items():
        assert torch.equal(weight, other["weights"][name])
    for rank in range(2):
        threads = json.loads((two / f"threads-{rank}.json").read_text())
        assert not [name for name in threads if "gloo" in name]
    assert (two / "run" / "training.json").is_file()
    assert not (two / "run" / "checkpoints").exists()


@pytest.mark.slow
def test_one_process_stopping_stops_both_and_they_go_on_bit_by_bit(tmp_path, whole):
    parts = tmp_path
    launch(parts, settings(parts), "6")
    assert (parts / "stopped-0").exists()
    assert (parts / "stopped-1").exists()
    (checkpoint,) = (parts / "run" / "checkpoints").iterdir()
    assert checkpoint.name == "checkpoint-7"
    # Not with another number of processes.
    run = LMTraining.of(json.loads(Path(settings(parts)).read_text()))
    from lm_worker import SONG

    with pytest.raises(InputError, match="number of processes"):
        train_lm(run, texts=SONG, out=parts / "run", progress=False)
    launch(parts, settings(parts))
    first, second = found(whole), found(parts)
    assert second["losses"] == first["losses"]
    assert second["metrics"] == first["metrics"]
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])


def test_a_step_a_layer_needs_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    optimizer = {**SETTINGS["optimizer"], "per_layer": True}
    loop = {**SETTINGS["loop"], "clip": None}
    run = LMTraining.of({**SETTINGS, "optimizer": optimizer, "loop": loop})
    from lm_worker import SONG

    with pytest.raises(InputError, match="averaged"):
        train_lm(run, texts=SONG, progress=False)


def test_a_clock_of_one_process_goes_by_itself():
    times = iter([5.0, 6.5, 8.0])
    clock = SharedClock(Processes(), torch.device("cpu"), lambda: True, lambda: next(times))
    assert not clock.stop
    clock.agree()
    assert clock.stop
    assert clock() == 1.5
