"""BEER inside Stable-Baselines3's TD3."""

import pytest
import torch
from torch.nn import functional

pytest.importorskip("stable_baselines3")
from stable_baselines3 import TD3
from stable_baselines3.common.noise import NormalActionNoise

from fullrank.core.errors import InputError
from fullrank.rl import BEERTD3, BEERRegularizer


def agent(kind=BEERTD3, **changes):
    options = {
        "learning_starts": 60,
        "buffer_size": 500,
        "batch_size": 32,
        "seed": 0,
        "device": "cpu",
        "policy_kwargs": {"net_arch": [16, 16]},
    }
    return kind("MlpPolicy", "Pendulum-v1", **{**options, **changes})


def weights(found):
    return [p.detach().clone() for p in found.policy.parameters()]


def test_without_weight_it_is_td3():
    plain, off = agent(TD3).learn(120), agent(beta=0.0).learn(120)
    for a, b in zip(weights(plain), weights(off), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("critics", [1, 2])
def test_the_critics_gradient_is_that_of_the_whole_loss(critics):
    options = {"policy_kwargs": {"net_arch": [16, 16], "n_critics": critics}}
    found = agent(beta=50.0, target_policy_noise=0.0, **options).learn(70)
    batch = found.replay_buffer.sample(32)
    found.replay_buffer.sample = lambda *args, **kwargs: batch
    gradients = []
    step = found.critic.optimizer.step
    found.critic.optimizer.step = lambda: (
        gradients.extend(p.grad.clone() for p in found.critic.parameters()),
        step(),
    )

    def features(net, obs, actions):
        return net[:-1](torch.cat([obs, actions], dim=1))

    loss = 0.0
    with torch.no_grad():
        following = found.actor_target(batch.next_observations)
        values = torch.cat(found.critic_target(batch.next_observations, following), dim=1)
        least = values.min(dim=1, keepdim=True).values
        goal = batch.rewards + (1 - batch.dones) * found.gamma * least
    for net, target in zip(found.critic.q_networks, found.critic_target.q_networks, strict=True):
        here = features(net, batch.observations, batch.actions)
        there = features(target, batch.next_observations, following)
        head = net[-1]
        term = BEERRegularizer(50.0, found.gamma)
        loss = loss + functional.mse_loss(head(here), goal)
        loss = loss + term(here, there, batch.rewards, head.weight, batch.dones, head.bias)
        assert term.last_stats["violating"] > 0
    expected = torch.autograd.grad(loss, list(found.critic.parameters()))
    found.train(gradient_steps=1, batch_size=32)
    assert gradients
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_rows_cut_short_by_the_end_of_an_episode_have_their_own_discount(monkeypatch):
    seen = []
    forward = BEERRegularizer.forward

    def spied(self, *args, **options):
        seen.append(options["discount"])
        return forward(self, *args, **options)

    monkeypatch.setattr(BEERRegularizer, "forward", spied)
    agent(beta=1.0, n_steps=3, batch_size=64).learn(62)
    gammas = {round(value, 6) for value in seen[0].flatten().tolist()}
    assert gammas <= {round(0.99**n, 6) for n in (1, 2, 3)}
    assert len(gammas) > 1  # the buffer's newest transitions have fewer steps behind them


def test_nothing_is_left_behind(tmp_path):
    found = agent(action_noise=NormalActionNoise([0.0], [0.1])).learn(120)
    for net in [*found.critic.q_networks, *found.critic_target.q_networks]:
        assert not net[-1]._forward_pre_hooks
    assert "sample" not in vars(found.replay_buffer)
    assert 0 <= found.logger.name_to_value["train/beer_violating"] <= 1
    found.save(tmp_path / "agent")
    again = BEERTD3.load(tmp_path / "agent", env=found.get_env())
    assert again.beta == found.beta
    for a, b in zip(weights(found), weights(again), strict=True):
        assert torch.equal(a, b)


def test_negative_weight():
    with pytest.raises(InputError, match="beta"):
        agent(beta=-1.0)
