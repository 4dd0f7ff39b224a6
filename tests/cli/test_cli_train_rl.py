"""`fullrank train rl`: its example is a run, and it trains one."""

import json

import pytest

from fullrank.training.rl_config import RLRun


def test_the_example_is_a_run(fullrank, tmp_path):
    outcome = fullrank("train", "rl", "--example")
    assert outcome.code == 0
    (tmp_path / "run.yaml").write_text(outcome.out)
    run = RLRun.read(tmp_path / "run.yaml")
    assert run.trainer.method == "verl"
    assert run.trainer.options["rank_stride"] == 4


def test_it_trains_and_says_what_came_of_it(fullrank, tmp_path):
    pytest.importorskip("trl")
    (tmp_path / "run.yaml").write_text(fullrank("train", "rl", "--example").out)
    small = ["model.config.hidden_size=16", "model.config.num_hidden_layers=1"]
    small += ["model.warmup_steps=2", "data.problems=12", "data.dev_problems=2", "loop.steps=1"]
    small += ["trainer.options.per_device_train_batch_size=8", "loop.samples=2"]
    small += ["trainer.options.max_completion_length=8", "loop.device=cpu"]
    out = tmp_path / "out"
    outcome = fullrank("train", "rl", tmp_path / "run.yaml", *small, "--out", out)
    assert outcome.code == 0, outcome
    assert "best of 2" in outcome.out
    result = json.loads((out / "rl.json").read_text())
    assert len(result["rewards"]) == 1
    assert result["after"]["samples"] == 2
    absent = "reward.functions=[absent_module:f]"
    outcome = fullrank("train", "rl", tmp_path / "run.yaml", absent, "--out", tmp_path / "b")
    assert outcome.code == 2
    assert "absent_module" in outcome.err
