"""A linear layer with RandLoRA adapters, each with its own rank and bases."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullrank.adapters.randlora_bases import Bases, bases_needed
from fullrank.adapters.randlora_product import Update, by_weight, delta, linear, update_of
from fullrank.adapters.tuner_layer import Held, TunerLayer

Scaling = Literal["official", "peft"]


def scale_of(alpha: float | None, scaling: Scaling, r: int, count: int) -> float:
    """Return s for a layer with so many bases of rank r.

    ``"official"``: ``alpha / (r sqrt(N))``, alpha 2 r by default; ``"peft"``: ``alpha / r``, alpha
    20 r by default.

    >>> scale_of(None, "official", 8, 16), scale_of(None, "peft", 8, 16)
    (0.5, 20.0)
    """
    if scaling == "peft":
        return (20.0 * r if alpha is None else alpha) / r
    return (2.0 * r if alpha is None else alpha) / (r * math.sqrt(count))


class RandLoraLinear(TunerLayer):
    """A layer whose bases are elsewhere: the model owns them, the layers look them up."""

    held = (Held("randlora_lambda", trained=True), Held("randlora_gamma", trained=True))
    beside = ("bases",)
    randlora_lambda: nn.ParameterDict
    randlora_gamma: nn.ParameterDict
    bases: dict[str, Bases]

    def sizes(self, config: Any) -> tuple[int, float]:
        """Return the rank of a basis, and s."""
        count = bases_needed(min(self.shape), config.r)
        return config.r, scale_of(config.alpha, config.scaling, config.r, count)

    def make(self, adapter_name: str, config: Any) -> None:
        """Start Lambda and Gamma; the bases are set afterwards."""
        width, count = min(self.shape), bases_needed(min(self.shape), config.r)
        # Lambda of 0 makes the update 0; an adapter that starts from nothing in particular
        # (init_weights=False) changes outputs at once, which tests of PEFT's kind need.
        lam = torch.zeros if config.init_weights else torch.randn
        self.randlora_lambda[adapter_name] = nn.Parameter(lam(config.r, count))
        gamma = torch.full((count, width), 1 / max(count, width))
        self.randlora_gamma[adapter_name] = nn.Parameter(gamma)

    def update_from(self, adapter: str, device: torch.device | None = None) -> Update:
        """Gather the numbers of an adapter's update for this layer."""
        bases, config = self.bases[adapter], self.settings[adapter]
        lam, gam = self.randlora_lambda[adapter], self.randlora_gamma[adapter]
        A, B = bases.A.to(device or lam.device), bases.B.to(device or lam.device)
        return update_of(A, B, lam, gam, self.scaling[adapter], self.shape, config.pairing)

    @torch.no_grad()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return what merging adds to the weight, in its orientation and at least float32."""
        u = self.update_from(adapter)
        wide = torch.promote_types(u.lam.dtype, torch.float32)
        found = delta(u._replace(lam=u.lam.to(wide), gam=u.gam.to(wide)))
        return self.oriented(found)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with that of the active adapters added."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            plain: Tensor = self.base_layer(x, *args, **kwargs)
            return plain
        result: Tensor | None = None
        for name in self.active_adapters:
            if name not in self.randlora_lambda:
                continue
            u, dropout = self.update_from(name, x.device), self.dropout[name]
            low_memory = self.settings[name].low_memory
            dropped = dropout.training and not isinstance(dropout, nn.Identity)
            if result is None and not (dropped or args or kwargs):
                base = self.base_layer
                if shares_weight(base, u) and by_weight(x, u, low_memory, shared=True):
                    weight = base.weight.T if self.fan_in_fan_out else base.weight
                    result = linear(x, u, weight, base.bias, low_memory=low_memory)
                    continue
            if result is None:
                result = self.base_layer(x, *args, **kwargs)
            update = linear(dropout(x) if dropped else x, u, low_memory=low_memory)
            result = (result + update).to(result.dtype)
        return self.base_layer(x, *args, **kwargs) if result is None else result


def shares_weight(base: Any, u: Update) -> bool:
    """Whether a layer is no more than a product with its weight, to which an update can be added.

    Hooks (offloading, FSDP, ours), subclasses and tensor subclasses may all mean something else,
    and a weight in half precision would round a small update away.
    """
    if type(base) is not nn.Linear and type(base).__name__ != "Conv1D":
        return False
    plain = type(base.weight) in (nn.Parameter, Tensor) and "forward" not in vars(base)
    hooked = base._forward_hooks or base._forward_pre_hooks
    hooked = hooked or base._backward_hooks or base._backward_pre_hooks
    return bool(
        plain
        and not hooked
        and base.weight.dtype == u.lam.dtype
        and base.weight.device == u.lam.device
    )
