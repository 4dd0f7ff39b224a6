"""Train from rewards: what ranks of representations tell a policy, and a critic."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.rl.beer import BEERRegularizer as BEERRegularizer
    from fullrank.rl.beer import beer_loss as beer_loss
    from fullrank.rl.beer import bellman_cosine_bound as bellman_cosine_bound
    from fullrank.rl.beer_td3 import BEERTD3 as BEERTD3
    from fullrank.rl.rewards import arithmetic_reward as arithmetic_reward
    from fullrank.rl.rewards import final_number as final_number
    from fullrank.rl.shaper import RankShaper as RankShaper
    from fullrank.rl.verl import VERLConfig as VERLConfig
    from fullrank.rl.verl import VERLRLOOConfig as VERLRLOOConfig
    from fullrank.rl.verl import VERLRLOOTrainer as VERLRLOOTrainer
    from fullrank.rl.verl import VERLTrainer as VERLTrainer

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["BEERRegularizer", "beer_loss", "bellman_cosine_bound"], "beer"),
        "BEERTD3": "beer_td3",
        **dict.fromkeys(["arithmetic_reward", "final_number"], "rewards"),
        "RankShaper": "shaper",
        **dict.fromkeys(["VERLConfig", "VERLRLOOConfig", "VERLRLOOTrainer", "VERLTrainer"], "verl"),
    },
)
