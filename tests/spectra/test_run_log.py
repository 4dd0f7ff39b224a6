"""Logs of training runs: whole, half written, from several writers."""

import json

import pytest
import torch
from torch import nn

from fullrank.core import InputError, MissingExtraError
from fullrank.spectra import RunLogCallback, read_run
from fullrank.spectra.run_log import sparkline
from fullrank.spectra.run_log_page import write_page, write_scalars, write_tensorboard
from fullrank.training.history import EvaluationRecord, StepRecord, TrainingHistory
from fullrank.training.lm_report import write_log


@pytest.fixture
def history():
    found = TrainingHistory("nDCG@10", stopped="steps")
    found.steps = [StepRecord(s, 3.0 / s, 1e-3, 1.0, float(s), 10 * s) for s in range(1, 7)]
    found.evaluations = [
        EvaluationRecord(s, 0.5 + s / 64, 200.0 - s, float(s), 0.5) for s in (0, 3, 6)
    ]
    return found


def test_a_finished_run(tmp_path, history):
    write_log(history, tmp_path)
    (tmp_path / "training.json").write_text(json.dumps({"history": history.to_json()}))
    log = read_run(tmp_path)
    assert log.stopped == "steps"
    assert log.damaged == 0
    assert log.measures["loss"] == {s: 3.0 / s for s in range(1, 7)}
    assert log.measures["dev nDCG@10"] == {0: 0.5, 3: 0.5 + 3 / 64, 6: 0.5 + 6 / 64}
    assert log.measures["RankMe"][6] == 194
    assert "dev metric" not in log.measures
    assert "seconds" not in log.measures
    assert log.last_step == 6


@pytest.mark.parametrize("cut", [1, 20, 45])
def test_a_line_that_is_being_written(tmp_path, history, cut):
    write_log(history, tmp_path)
    path = tmp_path / "log.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: -1 - cut])
    log = read_run(tmp_path)
    assert log.damaged == 1
    assert log.measures["loss"][5] == 3 / 5
    assert 6 not in log.measures["dev metric"]
    path.write_bytes(whole)
    assert read_run(tmp_path).measures["dev metric"][6] == 0.5 + 6 / 64


def test_damage_of_other_kinds(tmp_path):
    good = b'{"kind": "log", "step": 2, "loss": 1.5}'
    bad = [b'"text"', b"[1]", b'{"loss": 1}', b'{"step": "x"}', b'{"step": 1, "loss": \xc3', b"\0"]
    (tmp_path / "events.jsonl").write_bytes(b"\n".join([good, *bad, b"", good]))
    log = read_run(tmp_path)
    assert log.measures == {"loss": {2: 1.5}}
    assert log.damaged == len(bad)


def test_unfinished_runs(tmp_path, history):
    history.stopped = ""
    for step in (3, 12):
        place = tmp_path / "ours" / "checkpoints" / f"checkpoint-{step}"
        place.mkdir(parents=True)
        (place / "progress.json").write_text(json.dumps({"history": history.to_json()}))
        history.steps.append(StepRecord(12, 0.1, 1e-3, 1.0, 12.0, 120))
    log = read_run(tmp_path / "ours")
    assert log.last_step == 12
    assert log.stopped == ""
    place = tmp_path / "theirs" / "checkpoint-5"
    place.mkdir(parents=True)
    records = [{"step": 5, "loss": 2.0, "learning_rate": 0.1, "epoch": 1.0}]
    records.append({"step": 5, "eval/rankme": 30.0, "eval_runtime": 1.0, "note": "x"})
    (place / "trainer_state.json").write_text(json.dumps({"log_history": records}))
    measures = read_run(tmp_path / "theirs").measures
    assert measures["lr"] == {5: 0.1}
    assert measures["RankMe"] == {5: 30.0}
    assert "note" not in measures


def test_a_checkpoint_that_is_being_written(tmp_path):
    state = json.dumps({"log_history": [{"step": 5, "loss": 2.0}]})
    for step, text in ((5, state), (8, state[:30]), (10, None)):
        place = tmp_path / f"checkpoint-{step}"
        place.mkdir()
        if text is not None:
            (place / "trainer_state.json").write_text(text)
    log = read_run(tmp_path)
    assert log.measures == {"loss": {5: 2.0}}
    assert log.damaged == 1


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(InputError, match="no log of a training run"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        read_run(tmp_path / "absent")
    (tmp_path / "training.json").write_text('{"history"')
    assert read_run(tmp_path).damaged == 1


def test_the_callback_writes_what_can_be_read_while_it_runs(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Regression(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 1)

        def forward(self, x, y):
            return {"loss": (self.down(self.up(x)) - y).square().mean()}

    seen = []

    class Watching(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append(read_run(tmp_path).last_step)

    torch.manual_seed(0)
    data = [{"x": torch.randn(6), "y": torch.randn(1)} for _ in range(16)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    model = Regression()
    callbacks = [RunLogCallback(ranks_every=2), Watching()]
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=callbacks).train()
    log = read_run(tmp_path)
    assert seen == [0, 2, 2, 4, 4, 6]  # a step's own numbers are logged after it
    assert list(log.measures["loss"]) == [1, 2, 3, 4, 5, 6]
    assert list(log.ranks["up"]) == [0, 2, 4, 6]
    from fullrank.spectra import xray

    assert log.ranks["up"][6] == pytest.approx(xray(model)["up"].spectrum.effective_rank, abs=1e-4)
    assert log.rank_table().rows[0][0] == "up"
    assert log.stopped == "its trainer"
    assert "train_runtime" not in log.measures


def test_a_second_run_in_a_folder_takes_the_first_ones_place(tmp_path):
    first = [{"kind": "start", "step": 0}, {"kind": "ranks", "step": 0, "effective_rank": {"w": 9}}]
    first += [{"kind": "log", "step": s, "loss": 9.0} for s in range(1, 5)]
    first += [{"kind": "log", "step": 4, "train_runtime": 1.0}]
    second = [
        {"kind": "start", "step": 0},
        {"kind": "ranks", "step": 0, "effective_rank": {"w": 2}},
    ]
    second += [{"kind": "log", "step": s, "loss": 1.0} for s in (1, 2)]
    resumed = [{"kind": "start", "step": 1}, {"kind": "log", "step": 2, "loss": 0.5}]
    place = tmp_path / "checkpoint-4"
    place.mkdir()
    old = {"log_history": [{"step": s, "loss": 9.0, "grad_norm": 1.0} for s in range(1, 5)]}
    (place / "trainer_state.json").write_text(json.dumps(old))
    events = tmp_path / "events.jsonl"
    events.write_text("\n".join(map(json.dumps, [*first, *second])))
    log = read_run(tmp_path)
    assert log.measures == {"loss": {1: 1.0, 2: 1.0}}
    assert (log.ranks, log.stopped) == ({"w": {0: 2.0}}, "")
    events.write_text("\n".join(map(json.dumps, [*first, *second, *resumed])))
    assert read_run(tmp_path).measures == {"loss": {1: 1.0, 2: 0.5}}


def test_a_callback_that_came_later_leaves_what_was_before(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    old = {"log_history": [{"step": s, "loss": 9.0} for s in range(1, 7)]}
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(old))
    events = [{"kind": "start", "step": 4}, {"kind": "log", "step": 5, "loss": 1.0}]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    assert read_run(tmp_path).measures["loss"] == {1: 9.0, 2: 9.0, 3: 9.0, 4: 9.0, 5: 1.0}


def test_what_only_the_trainer_knows_of_this_run_is_shown(tmp_path):
    events = [{"kind": "start", "step": 0, "time": 0.0}, {"kind": "log", "step": 2, "loss": 1.0}]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)))
    (tmp_path / "checkpoint-4").mkdir()
    told = {"log_history": [{"step": 2, "loss": 9.0}, {"step": 4, "my_metric": 0.5}]}
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(told))
    assert read_run(tmp_path).measures == {"loss": {2: 1.0}, "my_metric": {4: 0.5}}


@pytest.mark.parametrize("model", [nn.Linear(3, 3), nn.Conv1d(1, 1, 1)])
def test_weights_that_cannot_be_measured_do_not_end_the_run(tmp_path, model):
    transformers = pytest.importorskip("transformers")
    with torch.no_grad():
        model.weight[0] = torch.nan
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none")
    state = transformers.TrainerState(is_world_process_zero=True)
    callback = RunLogCallback(ranks_every=1)
    with pytest.warns(UserWarning, match="no ranks at step 0"):
        callback.on_train_begin(arguments, state, None, model=model)
    for state.global_step in (1, 2):
        callback.on_step_end(arguments, state, None, model=model)
    callback.on_log(arguments, state, None, logs={"loss": 1.0})
    assert read_run(tmp_path).measures == {"loss": {2: 1.0}}


def test_scalars_and_page(tmp_path, history):
    write_log(history, tmp_path)
    lines = [{"kind": "ranks", "step": s, "effective_rank": {"a<b": 5.0 - s}} for s in (0, 3)]
    lines.append({"kind": "log", "step": 4, "odd": float("nan")})
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, lines)))
    log = read_run(tmp_path)
    written = []

    class Writer:
        def add_scalar(self, *scalar):
            written.append(scalar)

    count = write_scalars(log, Writer())
    assert count == len(written)
    assert ("effective_rank/a<b", 2.0, 3) in written
    assert ("dev_metric", 0.5 + 3 / 64, 3) in written
    assert not any(tag == "odd" for tag, *_ in written)
    text = write_page(log, tmp_path / "run.html", refresh=2).read_text()
    assert "a&lt;b" in text
    assert text.count("Effective rank of the weights") == 1
    assert "a<b" not in text
    assert '<meta http-equiv="refresh" content="2">' in text
    assert "refresh" not in write_page(log, tmp_path / "run.html").read_text()


def test_tensorboard_is_asked_for(tmp_path, history, monkeypatch):
    import sys

    write_log(history, tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"fullrank\[tensorboard\]"):
        write_tensorboard(read_run(tmp_path), tmp_path / "board")


def test_tensorboard_reads_it_back(tmp_path, history):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_log(history, tmp_path)
    folder = write_tensorboard(read_run(tmp_path), tmp_path / "board")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [e.step for e in events.Scalars("loss")] == [1, 2, 3, 4, 5, 6]


def test_sparklines():
    assert sparkline([1.0]) == "▁"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert len(sparkline([float(i) for i in range(1000)])) == 16
    assert "×" in sparkline([1.0, float("inf"), 2.0])
