"""`BEERTD3`: Stable-Baselines3's TD3 whose critics are regularised by BEER.

The term of BEER reaches a critic through its features alone. So its gradient is added where the
features' own gradient comes by in the backward pass, and the algorithm stays the library's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError, require
from fullrank.rl.beer import BEERRegularizer

require("stable_baselines3", extra="rl")
from stable_baselines3 import TD3  # noqa: E402


class BEERTD3(TD3):  # type: ignore[misc]
    """TD3 with BEER on each critic; with the arguments below, the paper's DPG.

    ``BEERTD3("MlpPolicy", env, policy_kwargs={"n_critics": 1, "net_arch": [256, 256]},
    policy_delay=1, target_policy_noise=0.0, learning_rate=3e-4, action_noise=...)``.

    Each critic's loss gets ``beta`` times its own term, as in the paper, which has one critic.
    Logs the share of rows that violate the bound and by how much, the mean cosine and the norm
    of the last weight.

    Parameters
    ----------
    policy, env, args, kwargs
        As for ``stable_baselines3.TD3``.
    beta
        Weight of the term: 1e-3 (paper). 0 is TD3, bit for bit.

    Raises
    ------
    InputError
        When ``beta`` is negative or not finite.

    Examples
    --------
    >>> agent = BEERTD3("MlpPolicy", "Pendulum-v1", beta=1e-3, buffer_size=1000, seed=0)
    >>> agent.learn(300).num_timesteps
    300
    """

    def __init__(
        self, policy: Any, env: Any, *args: Any, beta: float = 1e-3, **kwargs: Any
    ) -> None:
        if not 0 <= beta < float("inf"):
            raise InputError(f"beta={beta}; it is neither negative nor infinite")
        self.beta = beta
        super().__init__(policy, env, *args, **kwargs)

    def train(self, gradient_steps: int, batch_size: int = 100) -> None:
        """Train as TD3 does, with the term's gradient on the critics' features."""
        if self.beta == 0:
            super().train(gradient_steps, batch_size)
            return
        seen: list[dict[str, Tensor]] = []
        with _on_features(self, BEERRegularizer(self.beta, self.gamma), seen.append):
            super().train(gradient_steps, batch_size)
        for name in seen[0] if seen else ():
            mean = torch.stack([stats[name] for stats in seen]).mean()
            self.logger.record(f"train/beer_{name}", mean.item())


@contextmanager
def _on_features(
    agent: Any, term: BEERRegularizer, record: Callable[[dict[str, Tensor]], None]
) -> Iterator[None]:
    """Add the term's gradient to that of each critic's features, once for every batch.

    After a batch is drawn, the target critics are asked first, then the critics; when these are
    asked again, it is for the actor's sake.
    """
    buffer, draw = agent.replay_buffer, agent.replay_buffer.sample
    batch: list[Any] = [None]
    following: dict[int, Tensor] = {}
    fresh: set[int] = set()
    critics = list(zip(agent.critic.q_networks, agent.critic_target.q_networks, strict=True))

    def sample(*args: Any, **kwargs: Any) -> Any:
        batch[0] = draw(*args, **kwargs)
        fresh.update(range(len(critics)))
        return batch[0]

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            following[number] = inputs[0].detach()

        return hook

    def add(number: int, head: Any) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            features = inputs[0]
            if number not in fresh or not features.requires_grad:
                return
            fresh.discard(number)
            leaf = features.detach().requires_grad_()
            with torch.enable_grad():
                loss = term(
                    leaf,
                    following[number],
                    batch[0].rewards,
                    head.weight,
                    batch[0].dones,
                    head.bias,
                    # Rows that an episode's end cut short are fewer steps from their next state.
                    n_step=getattr(agent, "n_steps", 1),
                    discount=getattr(batch[0], "discounts", None),
                )
            (extra,) = torch.autograd.grad(loss, leaf)
            features.register_hook(lambda gradient: gradient + extra)  # type: ignore[no-untyped-call]
            record(term.last_stats)

        return hook

    with ExitStack() as stack:
        for number, (critic, target) in enumerate(critics):
            for head, hook in ((target[-1], keep(number)), (critic[-1], add(number, critic[-1]))):
                stack.callback(head.register_forward_pre_hook(hook).remove)
        buffer.sample = sample
        stack.callback(vars(buffer).pop, "sample", None)
        yield
