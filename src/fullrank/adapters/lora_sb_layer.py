"""A linear layer with LoRA-SB adapters, ``W0 + s B R A``: B and A frozen, R trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fullrank.adapters.lora_files import LowRank
from fullrank.adapters.lora_sb_start import Start, start_from_weight
from fullrank.adapters.tuner import TunerModel
from fullrank.adapters.tuner_layer import Held, TunerLayer
from fullrank.core.errors import InputError


class LoraSBLinear(TunerLayer):
    """The layer. ``started`` says whether an adapter has its factors yet."""

    held = (Held("lorasb_R", trained=True), Held("lorasb_A"), Held("lorasb_B"))
    beside = ("started",)
    lorasb_R: nn.ParameterDict
    lorasb_A: dict[str, Tensor]
    lorasb_B: dict[str, Tensor]
    started: dict[str, bool]

    def make(self, adapter_name: str, config: Any) -> None:
        """Start an adapter as its ``init`` says; ``"update"`` has factors of 0 until then."""
        out, width = self.shape
        r = config.r
        self.lorasb_R[adapter_name] = nn.Parameter(torch.zeros(r, r))
        self.lorasb_A[adapter_name] = torch.zeros(r, width)
        self.lorasb_B[adapter_name] = torch.zeros(out, r)
        self.started[adapter_name] = config.init != "update"
        empty = self.lorasb_R[adapter_name].is_meta or self.weight.is_meta
        if not config.init_weights:
            A, B = torch.randn(r, width) / width**0.5, torch.randn(out, r) / r**0.5
            self.set_start(adapter_name, Start(A, B, torch.randn(r, r), 0.0))
        elif config.init == "xs" and not empty:
            weight = self.oriented(self.get_base_layer().weight.detach())
            self.set_start(adapter_name, start_from_weight(weight, r, config.seed))

    @torch.no_grad()
    def set_start(self, adapter_name: str, start: Start) -> None:
        """Set an adapter's factors and core."""
        if not self.lorasb_R[adapter_name].is_meta:
            self.lorasb_R[adapter_name].copy_(start.R)
        self.lorasb_A[adapter_name].copy_(start.A)
        self.lorasb_B[adapter_name].copy_(start.B)
        self.started[adapter_name] = True

    def dtype_of(self, held: Held, adapter_name: str) -> torch.dtype:
        """Return ``core_dtype``, where one is asked for."""
        asked = self.settings[adapter_name].core_dtype
        found: torch.dtype = (
            super().dtype_of(held, adapter_name) if asked is None else getattr(torch, asked)
        )
        return found

    def add_update(self, adapter_name: str, result: Tensor, x: Tensor, base: Tensor) -> Tensor:
        """Add ``s B R A x``."""
        if self.training and not self.started[adapter_name]:
            raise InputError(
                f"LoRA-SB adapter {adapter_name!r} has no factors yet, and would learn nothing: "
                "call fullrank.adapters.lora_sb.initialize, or load it from a file"
            )
        core = linear(linear(x, self.lorasb_A[adapter_name]), self.lorasb_R[adapter_name])
        update = linear(core, self.lorasb_B[adapter_name])
        return result + self.scaling[adapter_name] * update

    @torch.no_grad()
    def to_lora(self, adapter_name: str) -> LowRank:
        """``A``, and ``s B R``."""
        B = self.lorasb_B[adapter_name] @ self.lorasb_R[adapter_name]
        return LowRank(self.lorasb_A[adapter_name].clone(), self.scaling[adapter_name] * B)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        for adapter_name in self.started:
            self.started[adapter_name] |= f"{prefix}lorasb_A.{adapter_name}" in state_dict


class LoraSBModel(TunerModel):
    """What ``get_peft_model`` makes from a :class:`~fullrank.adapters.LoraSBConfig`."""

    prefix = "lorasb_"
    tuner_layer_cls = LoraSBLinear
    title = "LoRA-SB"

    def takes_quantised(self, config: Any) -> bool:
        """Only for factors that come from elsewhere: a start needs the weight or its gradient."""
        return bool(config.init == "given")

    def takes_factorised(self, config: Any) -> bool:
        """Only for a start that needs no gradient of the weight, which factors do not have."""
        return bool(config.init != "update")
