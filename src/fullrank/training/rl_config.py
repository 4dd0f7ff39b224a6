"""`RLRun`: training from rewards, as a file says it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fullrank.training.config import MOST_SEED
from fullrank.training.lm_config import RunSettings, Section

Method = Literal["verl", "grpo", "verl_rloo", "rloo"]

ARITHMETIC = "arithmetic"
"""Name of the built-in problems, and of the built-in reward."""

# What the run says itself, in other sections.
_TAKEN = frozenset(
    {
        "output_dir",
        "max_steps",
        "seed",
        "use_cpu",
        "report_to",
        "save_strategy",
        "save_steps",
        "save_total_limit",
    }
)


class PolicySection(Section):
    """The model that is trained.

    Parameters
    ----------
    name
        A folder or a Hugging Face name of a causal language model.
    config
        Instead: settings of a new one, as transformers' configuration of ``model_type``. It is
        taught the built-in problems' solutions first, ``warmup_steps`` steps of 32 of them.
    """

    name: str | None = None
    config: dict[str, Any] | None = None
    warmup_steps: int = Field(default=1000, ge=1)
    warmup_lr: float = Field(default=3e-3, gt=0)

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.name is None) == (self.config is None):
            raise ValueError("give name: of a model, or config: of a new one; not both")
        return self


class ProblemSection(Section):
    """What is asked.

    Parameters
    ----------
    source
        ``"arithmetic"``: sums of three numbers with the working written out; or a JSONL file with
        ``prompt`` and the columns that the reward functions take, such as ``answer``.
    problems, dev_problems
        Built-in ones: how many to train on, and how many others to measure on. Of a file so many
        of its last lines are measured on.
    """

    source: str = ARITHMETIC
    problems: int = Field(default=2000, ge=2)
    dev_problems: int = Field(default=100, ge=1)


class RewardSection(Section):
    """How a response is judged.

    Parameters
    ----------
    functions
        ``"arithmetic"``: 1 where the final number is that of the column ``answer``, else 0; or
        ``"module:function"``, imported from the folder the command runs in or what is installed,
        with TRL's signature: ``f(completions, **columns) -> list of numbers``. Rewards are added.
    """

    functions: list[str] = Field(default=[ARITHMETIC], min_length=1)


class TrainerSection(Section):
    """How it is trained.

    Parameters
    ----------
    method
        ``"verl"``: GRPO with VERL's shaping; ``"grpo"``; ``"verl_rloo"``; ``"rloo"``.
    options
        Any setting of TRL's configuration of that trainer, and VERL's (``rank_stride``, ...).
    """

    method: Method = "verl"
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _free(self) -> Self:
        taken = sorted(_TAKEN & set(self.options))
        if taken:
            raise ValueError(f"options {', '.join(taken)} are set by loop: and --out")
        return self


class RLLoop(Section):
    """How long, and what is watched.

    Parameters
    ----------
    steps
        Optimizer steps.
    save_every, ranks_every
        Steps between two checkpoints, and between two X-rays of the weights for ``fullrank see
        run``; 0 for no X-rays.
    samples
        Responses a dev problem is sampled for ``pass@k``; 0 to leave that out.
    """

    steps: int = Field(default=100, ge=1)
    save_every: int = Field(default=50, ge=1)
    ranks_every: int = Field(default=0, ge=0)
    samples: int = Field(default=8, ge=0)
    device: Literal["cpu", "cuda"] | None = None
    seed: int = Field(default=0, ge=0, le=MOST_SEED)


class RLRun(RunSettings):
    """A run: model, data, reward, trainer, loop.

    Examples
    --------
    >>> run = RLRun.of({"model": {"name": "folder"}}, ["trainer.method=grpo", "loop.steps=20"])
    >>> run.trainer.method, run.loop.steps, run.reward.functions
    ('grpo', 20, ['arithmetic'])
    """

    model: PolicySection
    data: ProblemSection = ProblemSection()
    reward: RewardSection = RewardSection()
    trainer: TrainerSection = TrainerSection()
    loop: RLLoop = RLLoop()

    @model_validator(mode="after")
    def _taught(self) -> Self:
        if self.model.config is not None and self.data.source != ARITHMETIC:
            raise ValueError(
                "model.config makes a new model, which is taught the built-in problems only; "
                "give model.name for problems of your own"
            )
        return self
