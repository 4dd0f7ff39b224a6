"""Jobs on language models: equal terms for every optimizer, and what a run tells."""

import dataclasses

import pytest
import torch

from fullrank.bench import lm_jobs
from fullrank.bench.entrants import ENTRANTS, HEAD, chosen_entrants
from fullrank.bench.sizes import Size, size_of
from fullrank.core import InputError
from fullrank.datasets.texts import Texts, read_texts
from fullrank.training.lm_config import OptimizerSection
from fullrank.training.lm_data import byte_tokenizer, load_lm
from fullrank.training.lm_optimizers import make_optimizer

MICRO = Size("micro", 16, 1, 2, context=16, batch=2, steps=6, evaluations=2, dev_bytes=2048)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return str(path)


def train_job(text, label, lr=None, seed=0, size=MICRO):
    (entrant,) = chosen_entrants([label])
    return lm_jobs.train_job(
        size, entrant, lr or entrant.centre, seed, read_texts(text), text, "cpu"
    )


@pytest.mark.parametrize("entrant", ENTRANTS, ids=lambda e: e.label)
def test_every_optimizer_has_the_same_body_and_the_same_split(entrant):
    torch.manual_seed(0)
    model = load_lm(None, MICRO.model(), byte_tokenizer(), "float32")
    section = OptimizerSection(**entrant.section(0.01, MICRO))
    rates = {
        id(p): group["lr"]
        for group in make_optimizer(model, section).param_groups
        for p in group["params"]
    }
    body = {n for n, p in model.named_parameters() if rates[id(p)] == 0.01}
    head = {n for n, p in model.named_parameters() if rates[id(p)] == 0.01 * HEAD}
    assert body == {n for n, p in model.named_parameters() if "layers" in n and p.ndim == 2}
    assert body | head == {n for n, _ in model.named_parameters()}


@pytest.mark.parametrize("entrant", ENTRANTS, ids=lambda e: e.label)
def test_memory_of_every_optimizer_holds_weights_gradients_and_state(entrant):
    found = lm_jobs.work(lm_jobs.memory_job(MICRO, entrant, "cpu"))
    model = load_lm(None, MICRO.model(), byte_tokenizer(), "float32")
    weights = sum(4 * p.numel() for p in model.parameters())
    assert found["state_bytes"] > 0
    assert found["peak_bytes"] >= 2 * weights + found["state_bytes"]
    if entrant.label == "AdamW":
        steps = len(list(model.parameters()))
        assert found["state_bytes"] == 2 * weights + 4 * steps


def test_grids_are_equally_large_with_two_rates_a_decade():
    grids = [entrant.rates(3) for entrant in ENTRANTS]
    assert {len(grid) for grid in grids} == {3}
    assert set(grids) == {(0.0003, 0.001, 0.003), (0.001, 0.003, 0.01), (0.03, 0.1, 0.3)}
    assert ENTRANTS[0].rates(5) == (0.0001, 0.0003, 0.001, 0.003, 0.01)
    assert ENTRANTS[0].rates(1) == (0.001,)


def test_times_of_all_contestants(monkeypatch):
    monkeypatch.setattr(lm_jobs, "GAP", 4)
    found = lm_jobs.work(lm_jobs.time_job(MICRO, chosen_entrants(["AdamW", "MKORH"]), "cpu"))
    assert list(found) == ["AdamW", "MKORH"]
    assert all(times["passes"] > 0 and times["optimizer"] > 0 for times in found.values())


def test_a_run_tells_its_last_loss_curve_and_sizes(text):
    found = lm_jobs.work(train_job(text, "AdamW"))
    assert [step for step, _ in found["curve"]] == [0, 3, 6]
    assert found["loss"] == found["curve"][-1][1] < found["curve"][0][1]
    assert (found["steps"], found["tokens"]) == (6, MICRO.tokens)
    assert found["state_bytes"] > 8 * found["parameters"]
    again = lm_jobs.work(train_job(text, "AdamW"))
    assert again == found
    other = lm_jobs.work(train_job(text, "AdamW", seed=1))
    assert other["curve"][0] != found["curve"][0]


def test_the_state_of_mkor_counts_its_factors(text):
    plain = lm_jobs.work(train_job(text, "SGD"))
    longer = dataclasses.replace(MICRO, steps=21)
    assert lm_jobs.work(train_job(text, "MKOR", size=longer))["state_bytes"] > plain["state_bytes"]


def test_a_run_that_diverges_has_no_loss(text):
    found = lm_jobs.work(train_job(text, "SGD", lr=1e30))
    assert found["loss"] is None
    assert "diverged" in found["why"]


def test_texts_that_changed_are_noticed(text, tmp_path):
    path = tmp_path / "changing.txt"
    path.write_text("one two three " * 100)
    job = train_job(str(path), "AdamW")
    path.write_text("three two one " * 100)
    with pytest.raises(InputError, match="have changed"):
        lm_jobs.work(job)


def test_the_sample_of_the_dev_part_is_from_all_over_it():
    dev = tuple(letter * 3000 for letter in "abcdef")
    found = lm_jobs.sampled(Texts("x", {"train": ("t",), "dev": dev}), 3 * 2048)
    assert [piece.strip()[0] for piece in found.parts["dev"]] == ["a", "c", "e"]
    assert found.size("dev") == 3 * 2048
    assert found.parts["train"] == ("t",)
    small = Texts("x", {"train": ("t",), "dev": ("é" * 100,)})
    assert lm_jobs.sampled(small, 4096) is small
    accents = Texts("x", {"train": ("t",), "dev": ("é" * 9999,)})
    assert set("".join(lm_jobs.sampled(accents, 4096).parts["dev"])) == {"é"}


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda: size_of("huge"), "size 'huge'; it is one of tiny, small, base"),
        (lambda: size_of("tiny", seeds=0), "seeds=0"),
        (lambda: chosen_entrants(["Adam"]), "no optimizer 'Adam' .* AdamW, Muon"),
    ],
)
def test_bad_choices(choose, message):
    with pytest.raises(InputError, match=message):
        choose()
