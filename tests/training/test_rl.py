"""`train_rl`: problems, rewards by name, runs that go on and end; bad input."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from fullrank.core import InputError, StoreError
from fullrank.spectra import read_run
from fullrank.training.lm_data import byte_tokenizer, load_lm
from fullrank.training.rl import train_rl
from fullrank.training.rl_config import ProblemSection, RLRun
from fullrank.training.rl_measure import measure, warm_up
from fullrank.training.rl_problems import read_problems, reward_functions, sums

TINY = {
    "model_type": "qwen2",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def run(method="verl", **loop):
    options = {
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
    }
    if method.startswith("verl"):
        options["rank_stride"] = 2
    return RLRun.of(
        {
            "model": {"config": TINY, "warmup_steps": 3},
            "data": {"problems": 20, "dev_problems": 3},
            "reward": {"functions": ["rl_rewards_for_tests:digits"]},
            "trainer": {"method": method, "options": options},
            "loop": {"steps": 2, "save_every": 1, "samples": 2, "device": "cpu", **loop},
        }
    )


@pytest.fixture(autouse=True)
def rewards(tmp_path, monkeypatch):
    """A module of rewards in the folder that the command runs in."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rl_rewards_for_tests.py").write_text(
        "LIMIT = 3\n"
        "def digits(completions, **_):\n"
        "    return [len(text) / 8 + sum(c.isdigit() for c in text) for text in completions]\n"
    )


@pytest.mark.parametrize("method", ["verl", "grpo", "verl_rloo", "rloo"])
def test_every_method_trains(method, tmp_path):
    trained = train_rl(run(method), tmp_path / "out")
    assert len(trained.rewards) == 2
    log = read_run(tmp_path / "out")
    assert ("rank/er" in log.measures) == method.startswith("verl")
    assert log.stopped
    assert (tmp_path / "out" / "model.safetensors").is_file()
    weights = load_lm(str(tmp_path / "out"), None, None, "float32").state_dict()
    start = load_lm(str(tmp_path / "out" / "start"), None, None, "float32").state_dict()
    assert any(not torch.equal(weights[name], start[name]) for name in weights)


def test_a_finished_run_is_read_and_another_refused(tmp_path):
    out = tmp_path / "out"
    first = train_rl(run(), out)
    assert train_rl(run(), out) == first
    with pytest.raises(InputError, match="other settings"):
        train_rl(run(seed=1), out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="something else"):
        train_rl(run(), tmp_path / "full")


def test_an_interrupted_run_ends_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole = train_rl(run(steps=3), tmp_path / "whole")
    from transformers import TrainerCallback

    from fullrank.training import rl

    make = rl._trainer

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                raise KeyboardInterrupt

    def stopped(*arguments):
        trainer = make(*arguments)
        trainer.add_callback(Stop())
        return trainer

    monkeypatch.setattr(rl, "_trainer", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_rl(run(steps=3), tmp_path / "cut")
    monkeypatch.setattr(rl, "_trainer", make)
    resumed = train_rl(run(steps=3), tmp_path / "cut")
    assert resumed.rewards == whole.rewards
    one, two = (
        load_lm(str(tmp_path / n), None, None, "float32").state_dict() for n in ("whole", "cut")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_run_that_had_only_to_be_measured_takes_no_step_more(tmp_path):
    whole = train_rl(run(), tmp_path / "run")
    weights = (tmp_path / "run" / "model.safetensors").read_bytes()
    (tmp_path / "run" / "rl.json").unlink()
    again = train_rl(run(), tmp_path / "run")
    assert (again.rewards, again.after) == (whole.rewards, whole.after)
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == weights
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_start_that_was_cut_off_is_made_again(tmp_path, monkeypatch):
    from transformers import PreTrainedModel

    def fail(self, folder, **_):
        (Path(folder) / "config.json").write_text("{}")
        raise OSError("no space left")

    save = PreTrainedModel.save_pretrained
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", fail)
    with pytest.raises(OSError, match="no space"):
        train_rl(run(), tmp_path / "cut")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)
    # What a trainer was writing is no checkpoint either.
    (tmp_path / "cut" / "checkpoint-1").mkdir()
    assert len(train_rl(run(), tmp_path / "cut").rewards) == 2


def test_a_damaged_mark_is_told(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(StoreError, match=r"run\.json is damaged"):
        train_rl(run(), tmp_path)


def test_warming_up_teaches(tmp_path):
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = load_lm(None, {**TINY, "hidden_size": 32}, tokenizer, "float32")
    rows = [{"prompt": f"{i}+{i}=", "answer": "7", "solution": "#### 7"} for i in range(9)]
    rewards = reward_functions(["arithmetic"])
    options = {"tokens": 8, "samples": 2}
    before = measure(model, tokenizer, rows, rewards, **options)
    assert before.greedy == 0
    warm_up(model, tokenizer, rows, steps=80, lr=1e-2, seed=0)
    after = measure(model, tokenizer, rows, rewards, **options)
    assert after.greedy == 1
    assert after.mean > 0.5
    assert after.best >= after.mean
    state = torch.get_rng_state()
    assert measure(model, tokenizer, rows, rewards, **options) == after
    assert torch.equal(torch.get_rng_state(), state)


def test_built_in_problems_are_right_and_apart():
    problems = read_problems(ProblemSection(problems=50, dev_problems=20), seed=1)
    assert len(problems.train) == 50
    assert len(problems.dev) == 20
    prompts = {row["prompt"] for row in problems.train}
    assert not prompts & {row["prompt"] for row in problems.dev}
    (reward,) = reward_functions(["arithmetic"])
    for row in problems.dev:
        assert eval(row["prompt"].rstrip("=")) == int(row["answer"])
        assert reward([row["solution"]], answer=[row["answer"]]) == [1.0]
    with pytest.raises(InputError, match="no 99999"):
        sums(99_999, seed=0)


def test_problems_of_a_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"{i}", "answer": "1"}) for i in range(10)))
    problems = read_problems(ProblemSection(source=str(path), dev_problems=4), seed=0)
    assert [row["prompt"] for row in problems.dev] == ["6", "7", "8", "9"]
    assert len(problems.train) == 6
    with pytest.raises(InputError, match="holds 10 problems"):
        read_problems(ProblemSection(source=str(path), dev_problems=9), seed=0)
    path.write_text('{"prompt": "a"}\n{"answer": 1}')
    with pytest.raises(InputError, match="line 2"):
        read_problems(ProblemSection(source=str(path)), seed=0)
    with pytest.raises(InputError, match="no file"):
        read_problems(ProblemSection(source="absent.jsonl"), seed=0)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("absent_module:f", "cannot be imported"),
        ("rl_rewards_for_tests:absent", "cannot be imported"),
        ("rl_rewards_for_tests:LIMIT", "not a function"),
        ("digits", "module:function"),
        (":digits", "module:function"),
    ],
)
def test_rewards_that_are_not_there(name, says):
    with pytest.raises(InputError, match=says):
        reward_functions([name])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("model.name=folder", "not both"),
        ("data.source=file.jsonl", "built-in problems only"),
        ("trainer.method=ppo", "trainer.method"),
        ("loop.steps=0", "loop.steps"),
    ],
)
def test_settings_that_do_not_fit(change, says):
    with pytest.raises(InputError, match=says):
        RLRun.of({"model": {"config": TINY}}, [change])


def test_options_of_the_trainer_are_checked(tmp_path):
    for taken in ("max_steps", "save_steps", "save_total_limit"):
        with pytest.raises(InputError, match=f"{taken} are set by"):
            RLRun.of({"model": {"name": "m"}, "trainer": {"options": {taken: 2}}})
    values = run().as_dict()
    values["trainer"]["options"]["num_generations"] = 3
    with pytest.raises(InputError, match=r"trainer\.options: .*num_generations"):
        train_rl(RLRun.of(values), tmp_path / "uneven")
    wrong = RLRun.of(
        {"model": {"config": TINY}, "trainer": {"method": "grpo", "options": {"rank_stride": 2}}}
    )
    with pytest.raises(InputError, match="rank_stride: GRPOConfig has no such setting"):
        train_rl(wrong, tmp_path / "out")
