"""One training loop for every model: Hugging Face's trainers plus our callbacks."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.training.config import EncoderTraining as EncoderTraining
    from fullrank.training.encoder import train_encoder as train_encoder
    from fullrank.training.finetune import Finetuned as Finetuned
    from fullrank.training.finetune import finetune as finetune
    from fullrank.training.finetune_config import FinetuneRun as FinetuneRun
    from fullrank.training.history import TrainingHistory as TrainingHistory
    from fullrank.training.lm import TrainedLM as TrainedLM
    from fullrank.training.lm import train_lm as train_lm
    from fullrank.training.lm_config import LMTraining as LMTraining
    from fullrank.training.lm_optimizers import make_optimizer as make_optimizer
    from fullrank.training.lm_optimizers import optimizer_names as optimizer_names
    from fullrank.training.optimizers import StateMemory as StateMemory
    from fullrank.training.optimizers import build_optimizer as build_optimizer
    from fullrank.training.pairs import TrainingPairs as TrainingPairs
    from fullrank.training.pairs import make_pairs as make_pairs
    from fullrank.training.ranking_loss import MaskedRankingLoss as MaskedRankingLoss
    from fullrank.training.results import TrainedEncoder as TrainedEncoder
    from fullrank.training.rl import TrainedPolicy as TrainedPolicy
    from fullrank.training.rl import train_rl as train_rl
    from fullrank.training.rl_config import RLRun as RLRun

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "EncoderTraining": "config",
        "train_encoder": "encoder",
        **dict.fromkeys(["Finetuned", "finetune"], "finetune"),
        "FinetuneRun": "finetune_config",
        **dict.fromkeys(["TrainedPolicy", "train_rl"], "rl"),
        "RLRun": "rl_config",
        "LMTraining": "lm_config",
        **dict.fromkeys(["TrainedLM", "train_lm"], "lm"),
        **dict.fromkeys(["make_optimizer", "optimizer_names"], "lm_optimizers"),
        "TrainedEncoder": "results",
        "TrainingHistory": "history",
        **dict.fromkeys(["StateMemory", "build_optimizer"], "optimizers"),
        **dict.fromkeys(["TrainingPairs", "make_pairs"], "pairs"),
        "MaskedRankingLoss": "ranking_loss",
    },
)
