"""BEER in an agent: Stable-Baselines3's TD3 with and without it on a control task, several seeds.

    python benchmarks/beer_control.py                        # 5 seeds, about 25 minutes on a core
    python benchmarks/beer_control.py --seeds 2 --steps 4000
    python benchmarks/beer_control.py --task Hopper-v5 --seeds 3 --steps 10000

Any task of Gymnasium with continuous actions; MuJoCo's need the extra ``mujoco``. One critic, no
policy delay and no target noise (the paper's DPG), two layers of 256. Return: mean of 20 episodes
of the final policy, without noise. Rank: of the critic's features on 1,000 transitions of the
replay buffer, of 256: how many singular values are above 1 % of the largest, and the effective
rank. Violating: share of these transitions whose features are more alike than the Bellman equation
allows, after training.
"""

from __future__ import annotations

import argparse
import statistics
import time

import gymnasium
import numpy as np
import torch
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.noise import NormalActionNoise

from fullrank.core import Table
from fullrank.rl import BEERTD3, BEERRegularizer
from fullrank.spectra import Spectrum

BETAS = (0.0, 1e-3, 0.1)


@torch.no_grad()
def features(agent: BEERTD3) -> tuple[Spectrum, float]:
    """Spectrum of the critic's features, and the share of transitions beyond the bound."""
    batch = agent.replay_buffer.sample(1000)
    critic, target = agent.critic.q_networks[0], agent.critic_target.q_networks[0]
    seen, coming = batch.observations.float(), batch.next_observations.float()
    following = agent.actor_target(coming)
    phi = critic[:-1](torch.cat([seen, batch.actions], dim=1))
    ahead = target[:-1](torch.cat([coming, following], dim=1))
    term = BEERRegularizer(1.0, agent.gamma)
    head = critic[-1]
    term(phi, ahead, batch.rewards, head.weight, batch.dones, head.bias)
    return Spectrum(phi), float(term.last_stats["violating"])


def train(task: str, beta: float, seed: int, steps: int) -> dict[str, float]:
    began = time.process_time()
    environment = gymnasium.make(task)
    actions = environment.action_space.shape
    agent = BEERTD3(
        "MlpPolicy",
        environment,
        beta=beta,
        seed=seed,
        policy_kwargs={"n_critics": 1, "net_arch": [256, 256]},
        policy_delay=1,
        target_policy_noise=0.0,
        learning_rate=3e-4,
        learning_starts=1000,
        action_noise=NormalActionNoise(np.zeros(actions), np.full(actions, 0.2)),
    )
    agent.learn(steps)
    seconds = time.process_time() - began
    tested = agent.get_env()
    tested.seed(1000 + seed)
    returned, _ = evaluate_policy(agent, tested, n_eval_episodes=20, warn=False)
    spectrum, violating = features(agent)
    values = spectrum.values
    return {
        "return": float(returned),
        "numerical rank": float((values > 0.01 * values[0]).sum()),
        "effective rank": spectrum.effective_rank,
        "violating": violating,
        "CPU s": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", default="Pendulum-v1")
    parser.add_argument("--betas", type=float, nargs="+", default=BETAS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for beta in args.betas:
        runs = [train(args.task, beta, seed, args.steps) for seed in range(args.seeds)]
        cells = []
        for name in runs[0]:
            found = [run[name] for run in runs]
            spread = statistics.stdev(found) if len(found) > 1 else 0.0
            cells.append(f"{statistics.fmean(found):.2f} ± {spread:.2f}")
        rows.append([f"{beta:g}", *cells, " / ".join(f"{run['return']:.0f}" for run in runs)])
    title = f"{args.task}, {args.steps:,} steps, {args.seeds} seeds, mean ± standard deviation"
    print(Table(["beta", *runs[0], "returns by seed"], rows, title=title).markdown())


if __name__ == "__main__":
    main()
