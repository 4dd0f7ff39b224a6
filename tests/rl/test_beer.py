"""BEER against the official code, and what its equations promise."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fullrank.core.errors import InputError
from fullrank.rl import BEERRegularizer, beer_loss, bellman_cosine_bound

REFERENCE = Path(__file__).parents[1] / "reference" / "beer"
CASES = [np.load(path) for path in sorted(REFERENCE.glob("*.npz"))]


def tensors(case, *names):
    return [torch.from_numpy(case[name]) for name in names]


def hyper(case):
    return dict(zip(case["hp_names"].tolist(), case["hp"].tolist(), strict=True))


def official(case, phi, step, beta):
    target, online, w, reward = tensors(
        case, "trace:phi_next_target", "trace:phi_next_online", "trace:w", "batch:reward"
    )
    term = BEERRegularizer(beta=beta, gamma=0.5, official=True)
    return term(phi, target[step], reward[step], w[step], next_features_for_bound=online[step])


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_bound_loss_and_gradient_are_the_official_ones(case):
    beta = hyper(case)["beta"]
    phi, target, online, w, reward, bound = tensors(
        case,
        "trace:phi",
        "trace:phi_next_target",
        "trace:phi_next_online",
        "trace:w",
        "batch:reward",
        "trace:upper_bound",
    )
    for step in range(len(phi)):
        found = bellman_cosine_bound(
            phi[step],
            target[step],
            reward[step],
            w[step],
            0.99,
            phi_next_norm=online[step].norm(dim=1),
            lowest=None,
        )
        torch.testing.assert_close(found, bound[step, :, 0], rtol=1e-10, atol=1e-12)
        features = phi[step].clone().requires_grad_()
        loss = official(case, features, step, beta)
        loss.backward()
        assert loss.item() == pytest.approx(float(case["trace:beer_loss"][step]), rel=1e-10)
        expected = torch.from_numpy(case["trace:grad_phi"][step])
        torch.testing.assert_close(features.grad, expected, rtol=1e-9, atol=1e-14)


def network(case, name, sizes):
    layers = [nn.Linear(a, b).double() for a, b in pairwise(sizes)]
    for number, layer in enumerate(layers, 1):
        layer.load_state_dict(
            {
                part: torch.from_numpy(case[f"init:{name}.l{number}.{part}"].copy())
                for part in ("weight", "bias")
            }
        )
    return nn.ModuleList(layers)


def features(net, x):
    for layer in net[:-1]:
        x = layer(x).relu()
    return x


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_a_whole_training_run_ends_where_the_official_one_does(case):
    hp = hyper(case)
    state, action, following, reward, not_done = tensors(
        case, "batch:state", "batch:action", "batch:next_state", "batch:reward", "batch:not_done"
    )
    width = case["init:critic.l1.weight"].shape[0]
    critic_sizes = [state.shape[-1] + action.shape[-1], width, width, 1]
    actor_sizes = [state.shape[-1], width, width, action.shape[-1]]
    critic, critic_target = (network(case, "critic", critic_sizes) for _ in range(2))
    actor, actor_target = (network(case, "actor", actor_sizes) for _ in range(2))
    critic_adam = torch.optim.Adam(critic.parameters(), lr=hp["lr"])
    actor_adam = torch.optim.Adam(actor.parameters(), lr=hp["lr"])
    beer = BEERRegularizer(beta=hp["beta"], official=True)

    def act(net, s):
        return hp["max_action"] * net[-1](features(net, s)).tanh()

    for t in range(len(state)):
        with torch.no_grad():
            there = features(
                critic_target, torch.cat([following[t], act(actor_target, following[t])], 1)
            )
            target = reward[t] + not_done[t] * hp["discount"] * critic_target[-1](there)
            online = features(critic, torch.cat([following[t], act(actor, following[t])], 1))
        here = features(critic, torch.cat([state[t], action[t]], 1))
        loss = nn.functional.mse_loss(critic[-1](here), target)
        loss = loss + beer(
            here, there, reward[t], critic[-1].weight, next_features_for_bound=online
        )
        critic_adam.zero_grad()
        loss.backward()
        critic_adam.step()
        value = critic[-1](features(critic, torch.cat([state[t], act(actor, state[t])], 1)))
        actor_adam.zero_grad()
        (-value.mean()).backward()
        actor_adam.step()
        for net, goal in ((critic, critic_target), (actor, actor_target)):
            for p, q in zip(net.parameters(), goal.parameters(), strict=True):
                q.data.lerp_(p.data, hp["tau"])
    for name, net in (("critic", critic), ("actor", actor), ("critic_target", critic_target)):
        for number, layer in enumerate(net, 1):
            expected = case[f"after{len(state)}:{name}.l{number}.weight"]
            np.testing.assert_allclose(layer.weight.detach().numpy(), expected, rtol=1e-7)


def draw(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return normal(rows, width), normal(rows, width), normal(rows), normal(width)


@given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 10_000), st.floats(0.1, 1.0))
def test_exact_bellman_consistency_never_violates_the_bound(rows, width, seed, gamma):
    noise, phi_next, reward, w = draw(rows, width, seed)
    w = w + torch.sign(w) * 0.1
    along = reward[:, None] * w / w.square().sum()
    orthogonal = noise - (noise @ w)[:, None] * w / w.square().sum()
    for rest in (orthogonal, torch.zeros_like(orthogonal)):
        phi = gamma * phi_next + along + rest
        bound = bellman_cosine_bound(phi, phi_next, reward, w, gamma, lowest=None)
        cosine = torch.cosine_similarity(phi, phi_next, dim=1)
        assert (cosine <= bound + 1e-6 * bound.abs().clamp_min(1)).all()
    # Without an orthogonal part it is an equality.
    torch.testing.assert_close(cosine, bound, rtol=1e-6, atol=1e-6)


@given(st.integers(1, 9), st.integers(2, 12), st.integers(0, 10_000))
def test_the_hinge_fires_only_where_the_reward_is_too_large_for_the_norms(rows, width, seed):
    phi, phi_next, reward, w = draw(rows, width, seed)
    phi.requires_grad_()
    excess = beer_loss(phi, phi_next, reward, w, 0.9, reduction="none")
    needed = (phi.norm(dim=1) - 0.9 * phi_next.norm(dim=1)).square()
    fired = excess > 0
    assert not (fired & (reward.square() / w.square().sum() < needed * (1 - 1e-9))).any()
    (gradient,) = torch.autograd.grad(excess.sum(), phi)
    assert ((gradient * phi).sum(1).abs() < 1e-9).all()
    assert (gradient[~fired] == 0).all()


def test_no_gradient_reaches_the_next_features_or_the_head():
    phi, phi_next, reward, w = (x.requires_grad_() for x in draw(8, 5, 0))
    beer_loss(phi, phi_next, 10 * reward, w, 0.99).backward()
    assert phi.grad.abs().sum() > 0
    assert phi_next.grad is None
    assert w.grad is None


def test_the_gradient_is_that_of_the_cosine_alone():
    phi, phi_next, reward, w = draw(6, 4, 3)
    phi.requires_grad_()
    rows = beer_loss(phi, phi_next, 20 * reward, w, 0.9, reduction="none")
    assert (rows > 0).sum() >= 3
    (found,) = torch.autograd.grad(rows.sum(), phi)
    here, there = phi.norm(dim=1, keepdim=True), phi_next.norm(dim=1, keepdim=True)
    cosine = (phi * phi_next).sum(1, keepdim=True) / (here * there)
    expected = phi_next / (here * there) - cosine * phi / here.square()
    torch.testing.assert_close(found, expected.detach() * (rows > 0)[:, None], rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dead_features_and_a_dead_head_stay_finite(dtype):
    phi, phi_next, reward, w = (x.to(dtype) for x in draw(4, 3, 0))
    phi[0] = 0
    phi_next[1] = 0
    for head in (w, torch.zeros_like(w)):
        features_ = phi.clone().requires_grad_()
        loss = beer_loss(features_, phi_next, reward, head, 0.99)
        loss.backward()
        assert torch.isfinite(loss)
        assert torch.isfinite(features_.grad).all()
        assert features_.grad.dtype == dtype


def test_terminal_rows_have_no_next_state():
    phi, phi_next, reward, w = draw(4, 3, 0)
    reward *= 50
    done = torch.tensor([1.0, 0, 0, 1])[:, None]
    rows = beer_loss(phi, phi_next, reward, w, 0.99, done, reduction="none")
    everything = beer_loss(phi, phi_next, reward, w, 0.99, reduction="none")
    assert rows[[0, 3]].tolist() == [0, 0]
    assert rows[1:3].tolist() == everything[1:3].tolist()
    unmasked = beer_loss(phi, phi_next, reward, w, 0.99, done, mask_terminal=False)
    assert unmasked == everything.mean()
    assert beer_loss(phi, phi_next, reward, w, 0.99, torch.ones(4, dtype=torch.bool)) == 0


def test_the_bias_and_several_steps_enter_the_equation():
    phi, phi_next, reward, w = draw(4, 3, 0)
    shifted = bellman_cosine_bound(phi, phi_next, reward, w, 0.9, bias=2.0, n_step=3)
    plain = bellman_cosine_bound(phi, phi_next, reward - (1 - 0.9**3) * 2.0, w, 0.9**3)
    torch.testing.assert_close(shifted, plain)


def test_rows_may_be_different_numbers_of_steps_apart():
    phi, phi_next, reward, w = draw(4, 3, 0)
    steps = [3, 1, 2, 3]
    discount = torch.tensor([[0.9**n] for n in steps])
    found = bellman_cosine_bound(
        phi, phi_next, reward, w, 0.9, bias=2.0, n_step=3, discount=discount
    )
    for row, n in enumerate(steps):
        alone = [x[row : row + 1] for x in (phi, phi_next, reward)]
        one = bellman_cosine_bound(*alone, w, 0.9, bias=2.0, n_step=n)
        torch.testing.assert_close(found[row : row + 1], one, atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match="discount of shape"):
        beer_loss(phi, phi_next, reward, w, 0.9, discount=discount[:2])


def test_statistics_of_the_last_batch():
    phi, phi_next, reward, w = draw(50, 3, 0)
    term = BEERRegularizer(beta=0.5, gamma=0.9)
    loss = term(phi, phi_next, 3 * reward, w)
    excess = beer_loss(phi, phi_next, 3 * reward, w, 0.9, reduction="none")
    assert 0 < term.last_stats["violating"] < 1
    assert term.last_stats["violating"] == (excess > 0).double().mean()
    torch.testing.assert_close(loss, 0.5 * term.last_stats["violation"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": 0.0}, "discount"),
        ({"gamma": 1.5}, "discount"),
        ({"n_step": 0}, "n_step"),
        ({"w": torch.ones(4)}, "one number a feature"),
        ({"reward": torch.ones(3)}, "reward"),
        ({"phi_next": torch.ones(5, 4)}, "features of shapes"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    phi, phi_next, reward, w = draw(5, 3, 0)
    values = {"phi": phi, "phi_next": phi_next, "reward": reward, "w": w, "gamma": 0.9, **change}
    with pytest.raises(InputError, match=message):
        bellman_cosine_bound(**values)


def test_settings_that_make_no_sense():
    with pytest.raises(InputError, match="beta"):
        BEERRegularizer(beta=-1)
    phi, phi_next, reward, w = draw(5, 3, 0)
    with pytest.raises(InputError, match="next_features_for_bound"):
        BEERRegularizer(official=True)(phi, phi_next, reward, w)
    with pytest.raises(InputError, match="reduction"):
        beer_loss(phi, phi_next, reward, w, 0.9, reduction="median")


def test_what_stands_behind_the_end_of_an_episode_never_counts():
    phi, phi_next, reward, w = draw(6, 4, 0)
    done = torch.tensor([1, 0, 0, 1, 0, 0])
    broken = torch.where(done[:, None] > 0, float("nan"), phi_next)
    phi.requires_grad_()
    loss = beer_loss(phi, broken, reward * 3, w, 0.9, done=done, next_features_for_bound=broken)
    assert loss == beer_loss(phi, phi_next, reward * 3, w, 0.9, done=done,
                             next_features_for_bound=phi_next)  # fmt: skip
    loss.backward()
    assert torch.isfinite(phi.grad).all()
    assert (phi.grad[done > 0] == 0).all()
    term = BEERRegularizer()
    assert torch.isfinite(term(phi, broken, reward, w, done=done, bias=0.5))
    assert all(torch.isfinite(value) for value in term.last_stats.values())


def test_arrays_will_do():
    phi, phi_next, reward, w = draw(6, 4, 0)
    arrays = [x.numpy() for x in (phi, phi_next, reward, w)]
    done = np.array([True, False] * 3)
    expected = beer_loss(phi, phi_next, reward, w, 0.9, done=torch.from_numpy(done), bias=0.5)
    assert beer_loss(*arrays, 0.9, done=done, bias=np.float32(0.5)) == expected
    bound = bellman_cosine_bound(phi, phi_next, reward, w, 0.9)
    assert torch.equal(bellman_cosine_bound(*arrays, 0.9), bound)


@pytest.mark.parametrize("beta", [-1.0, float("nan"), float("inf")])
def test_weights_that_make_no_sense(beta):
    with pytest.raises(InputError, match="beta="):
        BEERRegularizer(beta=beta)
