"""RandLoRA: full-rank updates at LoRA's number of trained parameters (arXiv 2502.00987).

The update is a sum of fixed random products of rank r, of which only two diagonals each are
trained. Importing this module makes the type known to PEFT, which then saves, loads, merges and
switches its adapters as any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal, Self

import torch

from fullrank.adapters.randlora_bases import Kind
from fullrank.adapters.randlora_layer import Scaling
from fullrank.adapters.randlora_model import RandLoraModel as RandLoraModel
from fullrank.adapters.randlora_product import Pairing
from fullrank.adapters.registration import register_tuner
from fullrank.adapters.tuner_config import TunerConfig
from fullrank.core.errors import InputError, PlanError
from fullrank.core.plan import RankPlan


@dataclass
class RandLoraConfig(TunerConfig):
    """Configuration for ``peft.get_peft_model``.

    A matrix ``(m, n)`` gets ``N (r + min(m, n))`` trained numbers with ``N = ceil(min(m, n) / r)``
    bases: a *smaller* r trains more and costs no more time. Its update has full rank.

    Parameters
    ----------
    r
        Rank of a basis: 32 (PEFT; the paper 6 to 64). At most the shorter side of any layer.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save
        PEFT's. ``nn.Linear`` and ``Conv1D`` only.
    alpha
        For ``scaling``; None for its default.
    scaling
        ``"official"`` (language code): ``alpha / (r sqrt(N))``, alpha 2 r by default; ``"peft"``
        (and the official vision code): ``alpha / r``, alpha 20 r by default. They agree at
        ``alpha_peft = alpha_official / sqrt(N)``. PEFT's default is about 70 times the official
        one at N = 48, and can diverge at LoRA's learning rates.
    bases
        ``"dense"`` (default), ``"sparse"`` (two thirds zeros) or ``"very_sparse"``
        (``1 - 1 / sqrt(width)``). Sparse ones are no faster. A column of zeros, which would freeze
        a direction in every layer, is drawn again.
    projection_key
        Seed of the bases, 0.
    save_projection
        ``"once"``: a file holds the bases, three bytes a number; ``"none"``: their checksum only,
        by which those drawn at loading are checked.
    basis_dtype
        Of the bases in memory: ``torch.float32``, or a narrower one. Products stay in the type of
        the trained numbers.
    pairing
        ``"upstream"``: columns of both bases meet by position, as in PEFT's and the official code;
        ``"paper"``: by the formula. Equally distributed, other numbers.
    dropout
        Of the adapters' inputs, 0. A layer with dropout cannot add its update to the weight, and
        is slower.
    low_memory
        Build updates again in backward rather than keep one matrix of a layer's shape from the
        forward pass.
    bias
        ``"none"``, ``"all"`` or ``"randlora_only"``.
    init_weights
        False starts Lambda at random instead of 0, so that the update is not 0; for tests.

    Raises
    ------
    InputError
        On values out of range; from ``get_peft_model`` on layers that are not linear or are
        narrower than r, and at loading on bases that are not the adapter's own.
    PlanError
        On a :class:`~fullrank.core.RankPlan`: r is no rank of a matrix here.

    Notes
    -----
    Gamma does not start at zero: weight decay on it shrinks the update. A process that loads such
    an adapter must import ``fullrank.adapters.randlora`` first, or PEFT does not know its type.

    Examples
    --------
    >>> import peft
    >>> from torch import nn
    >>> config = RandLoraConfig(r=2, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
    >>> model.print_trainable_parameters()
    trainable params: 12 || all params: 40 || trainable%: 30.0000
    """

    r: int = 32
    scaling: Scaling = "official"
    bases: Kind = "dense"
    projection_key: int = 0
    save_projection: Literal["once", "none"] = "once"
    basis_dtype: Any = field(default=torch.float32)
    pairing: Pairing = "upstream"
    low_memory: bool = False

    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "scaling": ("official", "peft"),
        "bases": ("dense", "sparse", "very_sparse"),
        "save_projection": ("once", "none"),
        "pairing": ("upstream", "paper"),
        "basis_dtype": ("float32", "bfloat16", "float16", "float64"),
        "bias": ("none", "all", "randlora_only"),
    }

    def __post_init__(self) -> None:
        # A file holds text.
        self.basis_dtype = str(self.basis_dtype).removeprefix("torch.")
        super().__post_init__()
        if isinstance(self.r, RankPlan):
            raise PlanError(
                "RandLoRA takes no plan: its r is the rank of a basis, of which a smaller one "
                "trains more numbers, and every update has full rank; give one r"
            )
        self.check_whole("r", 1)
        if not 0 <= self.projection_key < 1 << 63:
            raise InputError(f"projection_key={self.projection_key!r}; it is in [0, 2^63)")

    @classmethod
    def from_peft(cls, config: Any) -> Self:
        """Translate PEFT's own ``RandLoraConfig``, so that its files load.

        Parameters
        ----------
        config
            PEFT's. The files must hold their projections: PEFT's bases differ from ours.

        Examples
        --------
        >>> import peft
        >>> RandLoraConfig.from_peft(peft.RandLoraConfig(r=4, randlora_alpha=8)).alpha
        8
        """
        same = {f.name for f in fields(cls)} & {f.name for f in fields(config)}
        same -= {"peft_type", "save_projection"}
        kind: Kind = "very_sparse" if config.very_sparse else "sparse" if config.sparse else "dense"
        return cls(
            **{name: getattr(config, name) for name in same},
            alpha=config.randlora_alpha,
            scaling="peft",
            bases=kind,
            projection_key=config.projection_prng_key,
            dropout=config.randlora_dropout,
        )


register_tuner("fullrank_randlora", RandLoraConfig, RandLoraModel)
