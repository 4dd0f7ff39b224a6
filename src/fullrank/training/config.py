"""`EncoderTraining`: everything that decides how an encoder is trained."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from fullrank.core.errors import InputError

OptimizerName = Literal["galore_adamw", "adamw"]
Decay = Literal["linear", "cosine", "constant"]
Precision = Literal["auto", "bfloat16", "float32"]
Select = Literal["metric", "rankme"]

MOST_SEED = 2**32 - 1
"""The largest seed that every generator takes."""


@dataclass(frozen=True)
class EncoderTraining:
    """How to fine-tune a dense encoder for retrieval.

    The defaults suit a small encoder and a few hundred to a few thousand judged queries.

    Parameters
    ----------
    optimizer
        ``"galore_adamw"`` keeps Adam's moments in a subspace of rank ``rank`` of each weight
        matrix in the encoder's layers (arXiv 2403.03507); ``"adamw"`` keeps them whole.
    lr
        Peak learning rate; None takes what suits the optimizer (:attr:`peak_lr`): 2e-5 for AdamW,
        5e-5 for GaLore, whose steps are shorter because they stay in a subspace. GaLore's
        matrices get ``lr / scale``, so that ``scale`` does not shrink the step as well.
    rank, update_proj_gap, scale
        GaLore's rank, steps between two subspaces, and factor of the update. Matrices that are
        no larger than the rank are not projected.
    weight_decay
        Of weight matrices; biases and norms never decay.
    seconds
        Wall-clock limit of the loop, evaluations included; the learning rate is planned to reach
        0 by then. None for no limit, which makes a run repeatable.
    epochs, max_steps
        Limits beside ``seconds``: whichever comes first ends training. ``max_steps`` wins over
        ``epochs`` where both are given.
    batch_size
        Pairs a step. Every other document of a batch is a negative of a query, so larger batches
        are harder.
    max_tokens
        Tokens of a query or a document while training; the model keeps its own limit afterwards.
    hard_negatives
        Documents a pair that BM25 ranks high and that are not judged relevant; 0 for none.
    max_pairs
        At most so many pairs are made, drawn at random.
    warmup
        Share of the run in which the learning rate rises.
    decay
        How it falls after that.
    similarity_scale
        Factor of the cosine before the softmax (the inverse of a temperature).
    max_grad_norm
        Gradients are clipped to this global norm.
    freeze_embeddings
        Leave the token embeddings as they are: they are more than half of a small encoder, and
        most of their rows meet no gradient in a short run.
    dropout
        Of every dropout layer while training; None keeps the model's own. Without dropout a step
        is faster on a CPU.
    precision
        ``"bfloat16"`` runs forward and backward under autocast. ``"auto"`` does where the
        hardware multiplies it natively (AVX-512 or AMX on a CPU: 1.7 times faster here).
    evaluations
        How often the development metric is measured, evenly spread; once more at the start.
        Fewer where all together would take more than a fifth of ``seconds``.
    patience
        Evaluations in a row without a new best after which training ends; None never ends it.
    metric
        Development metric, as ir-measures names it.
    select
        ``"metric"`` keeps the weights with the best development metric; ``"rankme"`` those with
        the highest RankMe of the documents' vectors (arXiv 2210.02885), which looks at no
        judgement. High rank is necessary for good vectors, not sufficient: noise raises it too,
        and so may weights that have hardly been trained.
    dev_queries, dev_documents, dev_tokens
        What an evaluation encodes, so that it costs a few seconds: at most so many queries, their
        judged documents and a random sample up to so many documents, cut to so many tokens. The
        metric is therefore higher than on the whole corpus; it ranks checkpoints.
    device
        Where to train; None picks a GPU if there is one.
    seed
        Of the order of pairs, the negatives, the development sample and dropout.

    Raises
    ------
    InputError
        For a value that makes no sense; the message says which would.

    Examples
    --------
    >>> EncoderTraining(optimizer="adamw", seconds=None, max_steps=100).max_steps
    100
    """

    optimizer: OptimizerName = "galore_adamw"
    lr: float | None = None
    rank: int = 64
    update_proj_gap: int = 50
    scale: float = 0.25
    weight_decay: float = 0.0
    seconds: float | None = 150.0
    epochs: float = 4.0
    max_steps: int | None = None
    batch_size: int = 32
    max_tokens: int = 64
    hard_negatives: int = 1
    max_pairs: int = 50_000
    warmup: float = 0.1
    decay: Decay = "linear"
    similarity_scale: float = 20.0
    max_grad_norm: float = 1.0
    freeze_embeddings: bool = True
    dropout: float | None = 0.0
    precision: Precision = "auto"
    evaluations: int = 4
    patience: int | None = 3
    metric: str = "nDCG@10"
    select: Select = "metric"
    dev_queries: int = 1000
    dev_documents: int = 1000
    dev_tokens: int = 64
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (
            ("optimizer", get_args(OptimizerName)),
            ("decay", get_args(Decay)),
            ("precision", get_args(Precision)),
            ("select", get_args(Select)),
        ):
            if getattr(self, name) not in choices:
                raise InputError(
                    f"{name} {getattr(self, name)!r} is none of {', '.join(map(repr, choices))}"
                )
        for name, least in _WHOLE.items():
            value = getattr(self, name)
            if value is None and name in ("max_steps", "patience"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise InputError(f"{name} is {value!r}; it is a whole number of at least {least}")
        if self.seed > MOST_SEED:
            raise InputError(f"seed is {self.seed}; the largest is {MOST_SEED}")
        for name in ("lr", "scale", "seconds", "epochs", "similarity_scale", "max_grad_norm"):
            value = getattr(self, name)
            if value is None and name in ("lr", "seconds"):
                continue
            if not (_is_finite(value) and value > 0):
                raise InputError(f"{name} is {value!r}; it is a positive number")
        if not (_is_finite(self.warmup) and 0 <= self.warmup < 1):
            raise InputError(f"warmup is {self.warmup!r}; it is a share in [0, 1)")
        if not (_is_finite(self.weight_decay) and self.weight_decay >= 0):
            raise InputError(f"weight_decay is {self.weight_decay!r}; it is a number from 0 on")
        if self.dropout is not None and not (_is_finite(self.dropout) and 0 <= self.dropout < 1):
            raise InputError(f"dropout is {self.dropout!r}; it is a share in [0, 1), or None")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate that is used."""
        return _LR[self.optimizer] if self.lr is None else self.lr

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return asdict(self)


# Best of a few on the development queries of pydocs, about 100 steps of 32 pairs.
_LR = {"adamw": 2e-5, "galore_adamw": 5e-5}

# Whole numbers, and the least that each may be. A batch of one pair has no negatives.
_WHOLE = {
    "rank": 1,
    "update_proj_gap": 1,
    "max_steps": 1,
    "batch_size": 2,
    "max_tokens": 3,
    "hard_negatives": 0,
    "max_pairs": 2,
    "evaluations": 1,
    "patience": 1,
    "dev_queries": 1,
    "dev_documents": 1,
    "dev_tokens": 3,
    "seed": 0,
}


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)
