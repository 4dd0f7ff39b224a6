"""A linear layer with FlyLoRA adapters: A and d frozen, B trained, k experts a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fullrank.adapters.flylora_merging import Experts
from fullrank.adapters.flylora_routing import Groups, count, rebalance, sparse_projection
from fullrank.adapters.lora_files import LowRank
from fullrank.adapters.tuner_layer import Held, TunerLayer
from fullrank.core.errors import InputError


class Padding:
    """Which tokens of the batch being run are real, for layers that see no mask.

    Attributes
    ----------
    tokens
        The model's ``attention_mask``, or None.
    """

    tokens: Tensor | None = None

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """Take it from the model's arguments, as a hook before its forward pass."""
        mask = kwargs.get("attention_mask")
        self.tokens = mask if isinstance(mask, Tensor) else None

    def of(self, x: Tensor) -> Tensor | None:
        """Return the mask of a layer's input, where it is one of these tokens."""
        fits = self.tokens is not None and self.tokens.shape == x.shape[:-1]
        return self.tokens if fits else None


class FlyLoraLinear(TunerLayer):
    """The layer. ``counts`` says how many tokens took each expert since the last rebalancing."""

    held = (Held("flylora_B", trained=True), Held("flylora_A"), Held("flylora_d"))
    beside = ("groups", "counts")
    flylora_B: nn.ParameterDict
    flylora_A: dict[str, Tensor]
    flylora_d: dict[str, Tensor]
    groups: dict[str, Groups]
    # No buffers: DDP would replace them by those of the first process before each forward pass.
    counts: dict[str, Tensor]

    padding: Padding | None = None

    def sizes(self, config: Any) -> tuple[int, float]:
        """Return all experts, and alpha / r (not alpha / k); 2 without an alpha."""
        r = sum(size for size, _ in config.experts)
        return r, 2.0 if config.alpha is None else config.alpha / r

    def make(self, adapter_name: str, config: Any) -> None:
        """Draw A; B and d start at 0."""
        r, (out, width) = self.r[adapter_name], self.shape
        self.groups[adapter_name] = config.experts
        density = config.sparsity or sum(k for _, k in config.experts) / r
        start = torch.zeros(out, r) if config.init_weights else torch.randn(out, r)
        self.flylora_B[adapter_name] = nn.Parameter(start)
        self.flylora_A[adapter_name] = sparse_projection(r, width, density, config.seed)
        self.flylora_d[adapter_name] = torch.zeros(r)
        self.counts[adapter_name] = torch.zeros(r)

    def experts(self, adapter_name: str) -> Experts:
        """Return an adapter's numbers."""
        return Experts(
            self.flylora_A[adapter_name],
            self.flylora_B[adapter_name],
            self.flylora_d[adapter_name],
            self.groups[adapter_name],
            self.scaling[adapter_name],
        )

    @torch.no_grad()
    def set_experts(self, adapter_name: str, experts: Experts) -> None:
        """Take over numbers of an adapter's own sizes, whatever their scale."""
        scale = experts.scale / self.scaling[adapter_name]
        self.flylora_A[adapter_name].copy_(experts.A)
        self.flylora_B[adapter_name].copy_(scale * experts.B)
        self.flylora_d[adapter_name].copy_(experts.d)

    def add_update(self, adapter_name: str, result: Tensor, x: Tensor, base: Tensor) -> Tensor:
        """Add what the experts that each token takes put out."""
        score = self.settings[adapter_name].score
        result, taken = self.experts(adapter_name)(result, x, score)
        if self.training and torch.is_grad_enabled():
            tokens = None if self.padding is None else self.padding.of(x)
            counts = self.counts[adapter_name]
            self.counts[adapter_name] = counts.to(taken.device) + count(taken, tokens)
        return result

    def rebalance(self, adapter_name: str, counts: Tensor) -> None:
        """Move d by the counts of all processes, and count anew."""
        d, rate = self.flylora_d[adapter_name], self.settings[adapter_name].bias_update_rate
        d.copy_(rebalance(d, counts, rate, self.groups[adapter_name]))
        self.counts[adapter_name] = torch.zeros_like(counts)

    def linear(self, adapter_name: str) -> bool:
        """Whether every token takes every expert, so that the update is one of low rank."""
        return all(size == k for size, k in self.groups[adapter_name])

    @torch.no_grad()
    def to_lora(self, adapter_name: str) -> LowRank:
        """``A``, and ``s B``: exact where every token takes every expert.

        Raises
        ------
        InputError
            When the choice depends on the token, and ``approximate`` is not asked for.
        """
        if not self.linear(adapter_name) and not self.settings[adapter_name].approximate:
            raise InputError(
                f"which experts of {adapter_name!r} add to the output depends on the token, so "
                "that no weight does what they do; keep the adapter beside the model. (With "
                "approximate=True in its configuration all experts are added, which is off by "
                "about as much as the adapter changes)"
            )
        B = self.flylora_B[adapter_name]
        return LowRank(self.flylora_A[adapter_name].clone(), self.scaling[adapter_name] * B)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether every token takes every expert."""
        return self.linear(adapter_name)
