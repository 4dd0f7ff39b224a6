"""Hydra: a parallel and a sequential low-rank branch that fold into the weight (arXiv 2309.06922).

Importing this module makes the type known to PEFT, which then saves, loads, merges and switches
its adapters as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from fullrank.adapters.hydra_layer import HydraModel as HydraModel
from fullrank.adapters.registration import register_tuner
from fullrank.adapters.tuner_config import TunerConfig
from fullrank.core.errors import InputError


@dataclass
class HydraConfig(TunerConfig):
    """Configuration for ``peft.get_peft_model``.

    A matrix ``(m, n)`` gets ``r_parallel (m + n) + 2 r_sequential m`` trained numbers.

    Parameters
    ----------
    r_parallel, r_sequential
        Ranks of the branch on the layer's input and of that on its output, 4 each (the paper 2
        to 8); 0 leaves one out. At most the shorter side of any layer.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save
        PEFT's. ``nn.Linear`` and ``Conv1D`` only. A branch on the output of a fused qkv projection
        mixes heads.
    r
        Both ranks at once; None (default) leaves them.
    alpha
        s is alpha over the larger rank; None (default) for s = 1. The paper's vision runs took s
        from 0.1 to 10.
    dropout
        Between A and B, 0.
    branch_bias
        Biases after A and after B, as in the official vision code; merging into a layer without a
        bias then makes one.
    init
        Of A: ``"kaiming"`` (uniform within 1 / sqrt(fan in), the default), ``"xavier"`` (VTAB) or
        ``"normal"`` (deviation 0.02, ELEVATER).
    parallel_pattern, sequential_pattern, alpha_pattern
        ``{pattern of a module's name: value}``, as PEFT's.
    bias
        ``"none"``, ``"all"`` or ``"hydra_only"``: biases of the adapted layers are trained.
    init_weights
        False starts B at random instead of 0; for tests.

    Raises
    ------
    InputError
        On values out of range; from ``get_peft_model`` on layers that are not linear or are
        narrower than a branch.

    Notes
    -----
    A process that loads such an adapter must import ``fullrank.adapters.hydra`` first, or PEFT
    does not know its type; ``save_as_lora`` writes one that plain PEFT loads.

    Examples
    --------
    >>> import peft
    >>> from torch import nn
    >>> config = HydraConfig(r_parallel=1, r_sequential=2, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
    >>> model.print_trainable_parameters()
    trainable params: 26 || all params: 54 || trainable%: 48.1481
    """

    r_parallel: int = 4
    r_sequential: int = 4
    r: int | None = None
    branch_bias: bool = False
    init: Literal["kaiming", "xavier", "normal"] = "kaiming"
    parallel_pattern: dict[str, int] = field(default_factory=dict)
    sequential_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "init": ("kaiming", "xavier", "normal"),
        "bias": ("none", "all", "hydra_only"),
    }
    patterns: ClassVar[Mapping[str, str]] = {
        "parallel_pattern": "r_parallel",
        "sequential_pattern": "r_sequential",
        "alpha_pattern": "alpha",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None:
            self.check_whole("r", 1)
            self.r_parallel = self.r_sequential = self.r
        self.check_whole("r_parallel", 0)
        self.check_whole("r_sequential", 0)
        if not self.r_parallel and not self.r_sequential:
            raise InputError("r_parallel and r_sequential are 0; give one of the branches a rank")


register_tuner("fullrank_hydra", HydraConfig, HydraModel)
