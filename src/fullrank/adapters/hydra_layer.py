"""A linear layer with Hydra adapters: a low-rank branch on its input, and one on its output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.adapters.hydra_branches import Branch, hydra_lora, hydra_output
from fullrank.adapters.lora_files import LowRank
from fullrank.adapters.tuner import TunerModel
from fullrank.adapters.tuner_layer import Held, TunerLayer


class HydraLinear(TunerLayer):
    """The layer. A branch without a rank has no entries, nor have biases that are not asked for."""

    held = tuple(
        Held(f"hydra_{branch}_{part}", trained=True)
        for branch in ("par", "seq")
        for part in ("A", "B", "a", "c")
    )

    def sizes(self, config: Any) -> tuple[int, float]:
        """Return both ranks together, and s = alpha over the larger one; 1 without an alpha."""
        ranks = (config.r_parallel, config.r_sequential)
        return sum(ranks), 1.0 if config.alpha is None else config.alpha / max(ranks)

    def make(self, adapter_name: str, config: Any) -> None:
        """Start A as the configuration says; B and the biases at 0, so that nothing is added."""
        out, width = self.shape
        for branch, rank, fan_in in (
            ("par", config.r_parallel, width),
            ("seq", config.r_sequential, out),
        ):
            if not rank:
                continue
            entries = {"A": torch.empty(rank, fan_in), "B": torch.zeros(out, rank)}
            if config.branch_bias:
                entries |= {"a": torch.zeros(rank), "c": torch.zeros(out)}
            _START[config.init](entries["A"])
            if not config.init_weights:
                entries["B"].normal_()
            for part, tensor in entries.items():
                getattr(self, f"hydra_{branch}_{part}")[adapter_name] = nn.Parameter(tensor)

    def branches(self, adapter_name: str) -> tuple[Branch | None, Branch | None]:
        """Return an adapter's parallel and sequential branch."""
        return self._branch("par", adapter_name), self._branch("seq", adapter_name)

    def _branch(self, branch: str, adapter_name: str) -> Branch | None:
        parts = [getattr(self, f"hydra_{branch}_{part}") for part in ("A", "B", "a", "c")]
        A, B, a, c = (part.get(adapter_name) for part in parts)
        return None if A is None else Branch(A, B, a, c)

    def inputs(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return the input as it is: dropout sits between A and B."""
        return x

    def add_update(self, adapter_name: str, result: Tensor, x: Tensor, base: Tensor) -> Tensor:
        """Add both branches; the sequential one sees the base layer's output."""
        parallel, sequential = self.branches(adapter_name)
        scale, dropout = self.scaling[adapter_name], self.dropout[adapter_name]
        return hydra_output(result, x, parallel, sequential, scale, base=base, dropout=dropout)

    @torch.no_grad()
    def to_lora(self, adapter_name: str) -> LowRank:
        """``[A_p; A_s W0]`` and ``s [B_p, B_s]``, of the base weight without what is merged."""
        return self._folded(adapter_name)[0]

    @torch.no_grad()
    def get_delta_bias(self, adapter_name: str) -> Tensor | None:
        """Return what both branches add whatever the input: ``s B_s A_s b0``, and their biases."""
        return self._folded(adapter_name)[1]

    def _folded(self, adapter_name: str) -> tuple[LowRank, Tensor | None]:
        weight, bias = self.original()
        parallel, sequential = self.branches(adapter_name)
        return hydra_lora(weight, bias, parallel, sequential, self.scaling[adapter_name])

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Only where no bias comes with the update."""
        return self.get_delta_bias(adapter_name) is None


class HydraModel(TunerModel):
    """What ``get_peft_model`` makes from a :class:`~fullrank.adapters.HydraConfig`."""

    prefix = "hydra_"
    tuner_layer_cls = HydraLinear
    title = "Hydra"

    def takes_quantised(self, config: Any) -> bool:
        """Yes: only merging multiplies with the base weight."""
        return True

    def most(self, config: Any, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the larger branch's rank, and the layer's shorter side."""
        return max(config.r_parallel, config.r_sequential), min(shape)


def _kaiming(tensor: Tensor) -> None:
    nn.init.kaiming_uniform_(tensor, a=5**0.5)


def _normal(tensor: Tensor) -> None:
    nn.init.normal_(tensor, std=0.02)


_START: Mapping[str, Callable[[Tensor], Any]] = {
    "kaiming": _kaiming,
    "xavier": nn.init.xavier_uniform_,
    "normal": _normal,
}
