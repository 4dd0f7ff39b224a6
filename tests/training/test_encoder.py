"""The whole loop on a tiny model: it learns, repeats itself, stops, and goes on."""

import dataclasses
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from toy_collection import make_toy

from fullrank.core import InputError, StoreError
from fullrank.training import EncoderTraining, train_encoder

STEPS = EncoderTraining(
    optimizer="adamw",
    lr=5e-3,
    seconds=None,
    max_steps=18,
    batch_size=8,
    max_tokens=16,
    evaluations=3,
    patience=None,
    precision="float32",
    freeze_embeddings=False,
    dropout=None,
    dev_tokens=16,
)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.fixture(scope="module")
def trained(tiny_folder, toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "out"
    return train_encoder(str(tiny_folder), toy, STEPS, out=out, progress=False)


def test_it_learns(trained):
    history = trained.history
    assert history.stopped == "steps"
    assert [s.step for s in history.steps] == list(range(1, 19))
    assert [e.step for e in history.evaluations] == [0, 6, 12, 18]
    assert history.gain > 0.1
    first, last = (
        np.mean([s.loss for s in part]) for part in (history.steps[:4], history.steps[-4:])
    )
    assert last < first - 0.3
    assert all(1 < e.rankme <= 32.1 for e in history.evaluations)
    assert history.tokens_per_second > 0


def test_the_folder_holds_a_model_and_its_history(trained, toy):
    from sentence_transformers import SentenceTransformer

    folder = trained.folder
    loaded = SentenceTransformer(str(folder), device="cpu")
    texts = list(toy.corpus.contents[:5])
    np.testing.assert_array_equal(loaded.encode(texts), trained.model.encode(texts))
    values = json.loads((folder / "training.json").read_text())
    assert values["history"]["metric"] == "nDCG@10"
    assert values["best"]["step"] == trained.history.best.step
    assert values["memory"]["adamw_bytes"] == 8 * values["memory"]["trained"]
    assert values["data"]["pairs"] == 64
    assert values["config"]["max_steps"] == 18
    assert not (folder / "checkpoints").exists()
    assert not any(p.name.startswith(".") for p in folder.iterdir())
    assert not list(folder.rglob("*.bin"))


def test_a_finished_run_is_loaded(trained, tiny_folder, toy):
    again = train_encoder(str(tiny_folder), toy, STEPS, out=trained.folder, progress=False)
    assert same(weights(again.model), weights(trained.model))
    assert again.history == trained.history
    assert again.memory == trained.memory


def test_a_finished_run_of_other_settings_is_kept(trained, tiny_folder, toy):
    other = dataclasses.replace(STEPS, lr=1e-3)
    with pytest.raises(InputError, match="another lr"):
        train_encoder(str(tiny_folder), toy, other, out=trained.folder, progress=False)
    with pytest.raises(InputError, match="another data"):
        train_encoder(str(tiny_folder), make_toy(parts=False), STEPS, out=trained.folder)


def test_damaged_result(tiny_folder, toy, tmp_path):
    (tmp_path / "training.json").write_text("{")
    with pytest.raises(StoreError, match="damaged"):
        train_encoder(str(tiny_folder), toy, STEPS, out=tmp_path, progress=False)


def test_repeats_itself_and_leaves_model_and_randomness_alone(trained, tiny, toy):
    before = weights(tiny)
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(5)
    np.random.seed(5)
    tiny.train()
    again = train_encoder(tiny, toy, STEPS, progress=False)
    assert (torch.rand(1), np.random.rand()) == expected
    assert same(before, weights(tiny))
    assert tiny.training
    assert all(p.requires_grad and p.grad is None for p in tiny.parameters())
    assert same(weights(again.model), weights(trained.model))
    assert again.folder is None


class Watched:
    """A development metric that does something at one of its calls."""

    __name__ = "watched"

    def __init__(self, values=None, at=None, action=None):
        self.values, self.at, self.action = values, at, action
        self.calls = 0

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.at:
            self.action()
        with torch.no_grad():
            return float(sum(p.double().abs().sum() for p in model.parameters())) / 1e4


def fail():
    raise OSError("no space left")


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("optimizer", ["adamw", "galore_adamw"])
@pytest.mark.parametrize(("action", "error"), [(fail, OSError), (interrupt, KeyboardInterrupt)])
def test_goes_on_bit_for_bit(tiny_folder, toy, tmp_path, optimizer, action, error):
    config = dataclasses.replace(
        STEPS, optimizer=optimizer, rank=4, update_proj_gap=5, max_steps=12, dropout=0.1
    )
    whole = train_encoder(
        str(tiny_folder), toy, config, out=tmp_path / "a", dev_metric=Watched(), progress=False
    )
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(error):
        train_encoder(
            str(tiny_folder),
            toy,
            config,
            out=tmp_path / "b",
            dev_metric=Watched(at=3, action=action),
            progress=False,
        )
    assert signal.getsignal(signal.SIGINT) is handler
    (checkpoint,) = (tmp_path / "b" / "checkpoints").iterdir()
    # Ctrl-C came in the evaluation after step 8, and waited for step 9.
    assert checkpoint.name == ("checkpoint-4" if action is fail else "checkpoint-9")
    torch.load(checkpoint / "optimizer.pt", weights_only=True)
    rest = train_encoder(
        str(tiny_folder), toy, config, out=tmp_path / "b", dev_metric=Watched(), progress=False
    )
    assert same(weights(rest.model), weights(whole.model))
    assert [(s.step, s.loss, s.lr) for s in rest.history.steps] == [
        (s.step, s.loss, s.lr) for s in whole.history.steps
    ]
    assert [(e.step, e.metric, e.rankme) for e in rest.history.evaluations] == [
        (e.step, e.metric, e.rankme) for e in whole.history.evaluations
    ]
    assert rest.history.steps[-1].tokens == whole.history.steps[-1].tokens
    assert rest.memory == whole.memory


def test_a_fresh_run_that_was_interrupted_goes_on(tiny_folder, toy, tmp_path):
    config = dataclasses.replace(STEPS, max_steps=4, evaluations=4)
    arguments = {"out": tmp_path, "progress": False}
    train_encoder(str(tiny_folder), toy, config, dev_metric=Watched(), **arguments)
    stopped = Watched(at=2, action=interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_encoder(str(tiny_folder), toy, config, dev_metric=stopped, resume=False, **arguments)
    rest = Watched()
    train_encoder(str(tiny_folder), toy, config, dev_metric=rest, **arguments)
    assert rest.calls > 0  # the run before it is not taken for this one


def test_ctrl_c_at_the_last_step_finishes_first(tiny_folder, toy, tmp_path):
    config = dataclasses.replace(STEPS, max_steps=4, evaluations=4)
    arguments = {"out": tmp_path / "out", "progress": False}
    metric = Watched(at=4, action=interrupt)
    with pytest.raises(KeyboardInterrupt):
        train_encoder(str(tiny_folder), toy, config, dev_metric=metric, **arguments)
    again = train_encoder(str(tiny_folder), toy, config, dev_metric=Watched(), **arguments)
    assert [s.step for s in again.history.steps] == [1, 2, 3, 4]
    assert metric.calls == 5


def test_a_save_that_was_cut_off_is_done_again(tiny_folder, toy, tmp_path):
    config = dataclasses.replace(STEPS, max_steps=2)
    (tmp_path / "out" / ".saving").mkdir(parents=True)
    result = train_encoder(str(tiny_folder), toy, config, out=tmp_path / "out", progress=False)
    assert not (result.folder / ".saving").exists()


def test_a_checkpoint_of_other_settings_is_not_continued(tiny_folder, toy, tmp_path):
    metric = Watched(at=3, action=fail)
    with pytest.raises(OSError, match="no space"):
        train_encoder(
            str(tiny_folder), toy, STEPS, out=tmp_path / "b", dev_metric=metric, progress=False
        )
    other = dataclasses.replace(STEPS, seed=1)
    arguments = {"out": tmp_path / "b", "dev_metric": Watched(), "progress": False}
    with pytest.raises(InputError, match="another seed"):
        train_encoder(str(tiny_folder), toy, other, **arguments)
    optimizer = tmp_path / "b" / "checkpoints" / "checkpoint-6" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:1000])
    with pytest.raises(StoreError, match="damaged"):
        train_encoder(str(tiny_folder), toy, STEPS, **arguments)
    fresh = train_encoder(str(tiny_folder), toy, STEPS, resume=False, **arguments)
    assert len(fresh.history.steps) == 18


def test_the_best_weights_are_kept(tiny_folder, toy):
    values = iter([0.5, 0.9, 0.2, 0.1])

    def falling(model):
        return next(values)

    config = dataclasses.replace(STEPS, patience=2)
    result = train_encoder(str(tiny_folder), toy, config, dev_metric=falling, progress=False)
    assert result.history.stopped == "steps"
    assert result.history.best.step == 6
    shorter = []

    def remember(model):
        shorter.append(weights(model))
        return float(len(shorter) == 2)

    config = dataclasses.replace(STEPS, patience=1)
    early = train_encoder(str(tiny_folder), toy, config, dev_metric=remember, progress=False)
    assert early.history.stopped == "patience"
    assert [e.step for e in early.history.evaluations] == [0, 6, 12]
    assert same(weights(early.model), shorter[1])


def test_training_that_harms_gives_the_model_back(tiny, toy):
    result = train_encoder(
        tiny,
        toy,
        dataclasses.replace(STEPS, max_steps=3),
        dev_metric=lambda model: -float(len(list(model.parameters()))) - next(count),
        progress=False,
    )
    assert result.history.best.step == 0
    assert same(weights(result.model), weights(tiny))


count = iter(range(100))


def test_the_clock_ends_it(tiny_folder, toy):
    config = dataclasses.replace(STEPS, seconds=0.05, max_steps=100_000)
    result = train_encoder(str(tiny_folder), toy, config, progress=False)
    assert result.history.stopped == "time"
    assert result.history.evaluations[-1].step == result.history.steps[-1].step


def test_evaluations_take_a_part_of_the_time(tiny_folder, toy):
    def slow(model):
        time.sleep(0.3)
        return 0.0

    config = dataclasses.replace(STEPS, seconds=1.0, max_steps=100_000, evaluations=9)
    result = train_encoder(str(tiny_folder), toy, config, dev_metric=slow, progress=False)
    assert len(result.history.evaluations) == 2


def test_frozen_embeddings_and_form(tiny, toy):
    config = dataclasses.replace(STEPS, max_steps=3, freeze_embeddings=True, dropout=0.0)
    before = weights(tiny)
    result = train_encoder(tiny, toy, config, progress=False, dev_metric=Watched())
    after = weights(result.model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert not any("word_embeddings" in name for name in changed)
    inner = result.model[0].auto_model
    assert inner.config._attn_implementation == tiny[0].auto_model.config._attn_implementation
    assert {m.p for m in result.model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert all(p.requires_grad for p in result.model.parameters())
    assert not result.model.training
    assert result.memory.frozen > 0


def test_bfloat16_and_galore(tiny_folder, toy):
    config = dataclasses.replace(
        STEPS,
        optimizer="galore_adamw",
        rank=4,
        update_proj_gap=6,
        precision="bfloat16",
        max_steps=12,
    )
    result = train_encoder(str(tiny_folder), toy, config, progress=False)
    assert result.history.gain > 0
    assert result.memory.share < 0.8
    assert all(p.dtype == torch.float32 for p in result.model.parameters())


def test_a_data_set_without_parts(tiny_folder):
    config = dataclasses.replace(STEPS, max_steps=2)
    result = train_encoder(str(tiny_folder), make_toy(parts=False), config, progress=False)
    assert result.data["queries"] == 43
    assert result.data["dev_queries"] == 5


def test_development_sample(tiny_folder, toy):
    config = dataclasses.replace(STEPS, max_steps=2, dev_queries=4, dev_documents=30)
    result = train_encoder(str(tiny_folder), toy, config, progress=False)
    assert result.data["dev_queries"] == 4
    assert result.data["dev_documents"] == 30
    assert result.data["dev_sampled"]
    assert f"30 of {len(toy.corpus)} documents" in result.table().title


def test_nothing_is_printed(tiny_folder, toy, capfd, tmp_path):
    config = dataclasses.replace(STEPS, max_steps=2)
    train_encoder(str(tiny_folder), toy, config, out=tmp_path / "out", progress=False)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_divergence_is_told(tiny_folder, toy):
    for optimizer in ("adamw", "galore_adamw"):
        config = dataclasses.replace(STEPS, optimizer=optimizer, lr=1e30, rank=4)
        with pytest.raises(InputError, match=r"lr|finite"):
            train_encoder(str(tiny_folder), toy, config, progress=False)


def test_bad_input(tiny, toy, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(InputError, match="is a file"):
        train_encoder(tiny, toy, STEPS, out=file)
    with pytest.raises(InputError, match="something else"):
        train_encoder(tiny, toy, STEPS, out=tmp_path)
    with pytest.raises(InputError, match="the model is a int"):
        train_encoder(3, toy, STEPS)
    with pytest.raises(InputError, match="no device 'gpu'"):
        train_encoder(tiny, toy, dataclasses.replace(STEPS, device="gpu"))
    with pytest.raises(InputError, match="no model"):
        train_encoder("./nowhere", toy, STEPS)
    with pytest.raises(InputError, match="no part 'dev'"):
        train_encoder(tiny, dataclasses.replace(toy, parts={"train": toy.parts["train"]}), STEPS)
    empty = dataclasses.replace(toy, parts={"train": toy.parts["train"], "dev": ()})
    with pytest.raises(InputError, match="nothing to measure"):
        train_encoder(tiny, empty, STEPS, progress=False)
    with pytest.raises(InputError, match="must be finite"):
        train_encoder(tiny, toy, STEPS, dev_metric=lambda m: float("nan"), progress=False)


def test_several_processes_are_refused(tiny, toy, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="one process"):
        train_encoder(tiny, toy, STEPS)
