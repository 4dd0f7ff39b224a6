"""VERL's shaping against the official code, and what it promises."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fullrank.core.errors import InputError
from fullrank.rl import RankShaper

FILES = sorted((Path(__file__).parents[1] / "reference" / "verl").glob("*.npz"))
MODES = {"PlanB": "adaptive", "FixTwo": "half", "FixOne": "both"}


def official(case):
    hp = dict(zip(case["hp_names"].tolist(), case["hp"].tolist(), strict=True))
    return RankShaper(
        hp["modulation_gain"],
        hp["kappa"],
        hp["ema_alpha"],
        dynamic=not hp["aux_fix"],
        mode=MODES[str(case["hypothesis"])],
        bonus_on="last_token",
        start="official",
    )


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_step_is_the_official_one(file):
    case = np.load(file)
    shaper = official(case)

    def at(name, step):
        return torch.from_numpy(case[name][step])

    for step in range(len(case["scores"])):
        measures = [at(f"{name}_f64", step) for name in ("er", "erv", "era")]
        if step:
            b = shaper.baselines
            expected = at("mids_before_f64", step)
            torch.testing.assert_close(torch.stack([b.era, b.erv, b.er]), expected)
        signal, beta = shaper.signal(*measures)
        torch.testing.assert_close(signal, at("aux_f64", step), rtol=0, atol=1e-9)
        if step and shaper.mode == "adaptive":
            torch.testing.assert_close(beta, at("beta_f64", step), rtol=0, atol=1e-9)
        shaped = shaper.shape(at("adv0_f64", step), *measures, mask=at("mask", step))
        torch.testing.assert_close(shaped, at("adv_f64", step), rtol=0, atol=1e-9)
        shaper.update(*measures, scores=at("scores", step))


def draw(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, rows, generator=generator, dtype=torch.float64)


@given(
    st.integers(1, 12),
    st.integers(0, 1000),
    st.floats(1.0, 8.0),
    st.sampled_from(["adaptive", "half", "both"]),
)
def test_the_bonus_is_bounded_and_keeps_the_sign(rows, seed, kappa, mode):
    shaper = RankShaper(kappa=kappa, mode=mode)
    shaper.update(*draw(rows, seed)[:3])
    *measures, advantages = draw(rows, seed + 1)
    advantages[0] = 0
    shaped = shaper.shape(advantages, *measures)
    assert (shaped >= advantages).all()
    assert ((shaped - advantages) <= advantages.abs() / kappa + 1e-12).all()
    assert shaped[0] == 0
    if kappa > 1:
        assert (shaped.sign() == advantages.sign()).all()


def test_without_weight_nothing_changes():
    shaper = RankShaper(aux_weight=0)
    shaper.update(*draw(5, 0)[:3])
    *measures, advantages = draw(5, 1)
    assert shaper.shape(advantages, *measures) is advantages


def test_the_first_batch_gets_no_bonus_and_sets_the_means():
    shaper = RankShaper(ema=0.5)
    *measures, advantages = draw(6, 0)
    assert torch.equal(shaper.shape(advantages, *measures), advantages)
    shaper.update(*measures)
    torch.testing.assert_close(torch.stack(shaper.baselines), torch.stack(measures).mean(1))
    following = draw(6, 1)[:3]
    shaper.update(*following)
    mean = (torch.stack(measures).mean(1) + following.mean(1)) / 2
    torch.testing.assert_close(torch.stack(shaper.baselines), mean)


def test_tokens():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]])
    measures = torch.tensor([[4.0, 9.0, 5.0], [0.1, 0.4, 0.2], [0.0, 0.5, 0.1]])
    advantages = torch.tensor([-1.0, 1.0, 1.0])
    whole, last = RankShaper(), RankShaper(bonus_on="last_token")
    for shaper in (whole, last):
        shaper.update(*measures)
    per_response = whole.shape(advantages, *measures)
    bonus = per_response - advantages
    assert bonus[1] > 0
    by_token = whole.shape(advantages, *measures, mask=mask)
    assert torch.equal(by_token, per_response[:, None] * mask)
    at_end = last.shape(advantages, *measures, mask=mask)
    assert torch.equal(at_end[1], torch.tensor([1.0, 1.0, 1.0 + bonus[1]]))
    assert (at_end[2] == 0).all()


@pytest.mark.parametrize(("official", "plain"), MODES.items())
def test_the_official_names(official, plain):
    one = RankShaper(ema="official", mode=official)
    other = RankShaper(ema=0.3, start="official", mode=plain)
    assert vars(one) == vars(other)
    *measures, adv = (x.numpy() for x in draw(4, 0))
    shaped = [
        s.shape(adv=adv, er=measures[0], erv=measures[1], era=measures[2]) for s in (one, other)
    ]
    assert torch.equal(*shaped)


@pytest.mark.parametrize("start", ["first_batch", "official"])
def test_state_goes_on_exactly(start, tmp_path):
    def run(shaper, steps):
        results = []
        for step in steps:
            *measures, advantages = draw(4, step)
            results.append(shaper.shape(advantages, *measures))
            shaper.update(*measures, scores=advantages.clamp(-1, 1))
        return results

    whole = run(RankShaper(start=start, dynamic=True), range(6))
    first, second = (RankShaper(start=start, dynamic=True) for _ in range(2))
    run(first, range(3))
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for a, b in zip(run(second, range(3, 6)), whole[3:], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "settings",
    [
        {"kappa": 0.0},
        {"ema": 0.0},
        {"aux_weight": -1.0},
        {"mode": "c"},
        {"bonus_on": "all"},
        {"kappa": float("nan")},
        {"ema": "none"},
    ],
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        RankShaper(**settings)


def test_what_does_not_fit_is_named():
    shaper = RankShaper()
    one, two = torch.ones(1), torch.ones(2)
    with pytest.raises(InputError, match="one each"):
        shaper.shape(two, one, one, one)
    with pytest.raises(InputError, match="one number a response"):
        shaper.update(one, two, one)
    with pytest.raises(InputError, match="mask"):
        RankShaper(bonus_on="last_token").shape(one, one, one, one)


def test_a_step_without_any_reward_leaves_the_score_alone():
    shaper = RankShaper(dynamic=True)
    measures = [torch.tensor([2.0, 3.0])] * 3
    shaper.update(*measures, torch.tensor([0.5]))
    before = shaper.state_dict()["score"]
    shaper.update(*measures, torch.tensor([torch.nan]))
    assert shaper.state_dict()["score"] == before > 0
