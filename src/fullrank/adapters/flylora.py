"""FlyLoRA: LoRA whose ranks are experts behind a frozen sparse router (arXiv 2510.08396).

Importing this module makes the type known to PEFT, which then saves, loads and switches its
adapters as any other.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

from fullrank.adapters.flylora_layer import FlyLoraLinear
from fullrank.adapters.flylora_merging import Experts, merge_experts
from fullrank.adapters.flylora_model import FlyLoraModel as FlyLoraModel
from fullrank.adapters.flylora_routing import Groups
from fullrank.adapters.lora_files import exact_targets
from fullrank.adapters.registration import register_tuner
from fullrank.adapters.tuner_config import TunerConfig
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_name


@dataclass
class FlyLoraConfig(TunerConfig):
    """Configuration for ``peft.get_peft_model``.

    A matrix ``(m, n)`` gets ``m r`` trained numbers. Train with ten times LoRA's learning rate or
    more: the entries of A are of size 1 / r.

    Parameters
    ----------
    r
        Experts, 32 (the paper's). At most the shorter side of any layer.
    k
        Experts that a token takes, 8.
    sparsity
        Share of non-zeros in each row of A; None (default) for k / r.
    target_modules, exclude_modules, layers_to_transform, layers_pattern, modules_to_save
        PEFT's. ``nn.Linear`` and ``Conv1D`` only.
    alpha
        The scaling is alpha / r; None (default) for 2 r.
    bias_update_rate
        u, by which :meth:`FlyLoraModel.update_balance` moves d: 1e-3 (the fork's script 1e-2).
    score
        ``"abs"``: experts with the largest ``|y + d|``; ``"signed"``: the largest ``y + d`` (the
        official PEFT fork).
    seed
        Of A, with each layer's name. Tasks that are to be merged want different ones.
    approximate
        Let merging into the weight add all experts, which is off by about as much as the adapter
        changes. Without it merging is refused unless k = r.
    rank_pattern, k_pattern, alpha_pattern
        ``{pattern of a module's name: value}``, PEFT's. Without a k of its own a layer keeps the
        ratio k / r.
    groups_pattern
        Pattern -> ``[[r, k], ...]``, the tasks of merged adapters, in place of r and k.
    dropout
        Of the adapters' inputs, 0.
    bias
        ``"none"``, ``"all"`` or ``"flylora_only"``.
    init_weights
        False starts B at random instead of 0; for tests.

    Raises
    ------
    InputError
        On values out of range; from ``get_peft_model`` on layers that are not linear or are
        narrower than r.

    Notes
    -----
    Call ``model.base_model.update_balance()`` after each optimizer step, or add
    :class:`~fullrank.adapters.flylora_callback.FlyLoraCallback` to the Hugging Face trainer. A
    process that loads such an adapter must import ``fullrank.adapters.flylora`` first, or PEFT does
    not know its type.

    Examples
    --------
    >>> import peft
    >>> from torch import nn
    >>> config = FlyLoraConfig(r=4, k=1, target_modules=["0"])
    >>> model = peft.get_peft_model(nn.Sequential(nn.Linear(6, 4)), config)
    >>> model.print_trainable_parameters()
    trainable params: 16 || all params: 44 || trainable%: 36.3636
    """

    r: int = 32
    k: int = 8
    sparsity: float | None = None
    bias_update_rate: float = 1e-3
    score: Literal["abs", "signed"] = "abs"
    seed: int = 0
    approximate: bool = False
    rank_pattern: dict[str, int] = field(default_factory=dict)
    k_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    groups_pattern: dict[str, list[list[int]]] = field(default_factory=dict)

    choices: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "score": ("abs", "signed"),
        "bias": ("none", "all", "flylora_only"),
    }
    patterns: ClassVar[Mapping[str, str]] = {
        "rank_pattern": "r",
        "k_pattern": "k",
        "alpha_pattern": "alpha",
        "groups_pattern": "groups",
    }
    # Of one layer, where a pattern says so.
    groups: ClassVar[list[list[int]] | None] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_whole("r", 1)
        self.check_whole("k", 1)
        if self.k > self.r:
            raise InputError(f"k={self.k} experts of r={self.r}; it is at most r")
        if self.sparsity is not None and not 0 < self.sparsity <= 1:
            raise InputError(f"sparsity={self.sparsity!r}; it is above 0 and at most 1")
        if not 0 <= self.bias_update_rate < float("inf"):
            raise InputError(f"bias_update_rate={self.bias_update_rate!r}; it is at least 0")

    def at(self, module: str) -> Self:
        """Return the settings of one layer, its own seed included."""
        found = super().at(module)
        if found.r != self.r and not self.says("k_pattern", module):
            found.k = max(1, round(self.k * found.r / self.r))
        if found.k > found.r:
            raise InputError(f"{module}: k={found.k} experts of r={found.r}; it is at most r")
        found.seed = self.seed + zlib.crc32(canonical_name(module).encode())
        return found

    @property
    def experts(self) -> Groups:
        """For each task, its experts and how many of them a token takes."""
        return [(r, k) for r, k in self.groups] if self.groups else [(self.r, self.k)]


register_tuner("fullrank_flylora", FlyLoraConfig, FlyLoraModel)


def merge_adapters(
    model: Any,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    into: str = "merged",
) -> dict[str, Experts]:
    """Add to a PEFT model one FlyLoRA adapter that does what several do together. It is exact.

    Their experts stand side by side, and each task chooses among its own: outputs are added, as
    several active adapters do; the merged one also has weights, and is one file.

    Parameters
    ----------
    model
        A ``PeftModel``; the adapters stay as they are, and the active one stays active.
    adapters
        Names of FlyLoRA adapters. Their sizes and layers may differ.
    weights
        One an adapter; 1 / (number of adapters) by default.
    into
        Name of the new adapter.

    Returns
    -------
    dict
        Name of a module of the base model -> its experts.

    Raises
    ------
    InputError
        When one is no FlyLoRA adapter, they choose by different scores, or weights are not what
        they should be.

    Examples
    --------
    >>> merge_adapters(model, ["gsm8k", "code"], [0.5, 0.5])  # doctest: +SKIP
    """
    configs = [model.peft_config.get(name) for name in adapters]
    for name, config in zip(adapters, configs, strict=True):
        if not isinstance(config, FlyLoraConfig):
            raise InputError(f"there is no FlyLoRA adapter {name!r}")
    if len({config.score for config in configs}) > 1:
        raise InputError("the adapters choose by different scores; one adapter has one")
    shares = [1 / len(configs)] * len(configs) if weights is None else list(weights)
    if len(shares) != len(configs):
        raise InputError(f"weights={shares}; {len(configs)} numbers are needed")
    merged = {
        name: merge_experts(
            [layer.experts(a) for a in adapters if a in layer.r],
            [share for a, share in zip(adapters, shares, strict=True) if a in layer.r],
        )
        for name, layer in _layers(model).items()
        if any(a in layer.r for a in adapters)
    }
    first = configs[0]
    config = FlyLoraConfig(
        r=max(len(experts.A) for experts in merged.values()),
        k=1,
        groups_pattern={
            f"^{name}$".replace(".", r"\."): [list(group) for group in experts.groups]
            for name, experts in merged.items()
        },
        score=first.score,
        bias_update_rate=first.bias_update_rate,
        target_modules=exact_targets(merged, dict(model.base_model.model.named_modules())),
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
    )
    model.add_adapter(into, config)
    for name, layer in _layers(model).items():
        if name in merged:
            layer.set_experts(into, merged[name])
    return merged


def _layers(model: Any) -> dict[str, FlyLoraLinear]:
    base = model.base_model.model
    return {name: m for name, m in base.named_modules() if isinstance(m, FlyLoraLinear)}
