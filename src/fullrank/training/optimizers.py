"""The optimizer that a configuration asks for, and the memory that its state really takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.core.names import named_linears
from fullrank.core.table import Cell, Table
from fullrank.optim.memory import state_bytes
from fullrank.training.config import EncoderTraining

# AdamW keeps two float32 moments a number.
_ADAMW_BYTES = 8


def build_optimizer(model: nn.Module, config: EncoderTraining) -> torch.optim.Optimizer:
    """Return the optimizer over what is trainable in a model.

    Weight matrices of linear layers whose smaller side exceeds ``config.rank`` are projected by
    GaLore; every other parameter (embeddings, biases, norms) gets plain AdamW.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16))
    >>> optimizer = build_optimizer(model, EncoderTraining(rank=4, lr=1e-3))
    >>> [(g["rank"], g["lr"], len(g["params"])) for g in optimizer.param_groups]
    [(4, 0.004, 1), (None, 0.001, 3)]
    """
    galore = config.optimizer == "galore_adamw"
    linear = {id(weight) for weight in _linear_weights(model)}
    projected: list[Tensor] = []
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if galore and id(parameter) in linear and min(parameter.shape) > config.rank:
            projected.append(parameter)
        elif parameter.ndim >= 2:
            matrices.append(parameter)
        else:
            vectors.append(parameter)
    plain: list[dict[str, Any]] = [{"params": vectors, "weight_decay": 0.0}]
    if config.weight_decay:
        plain.append({"params": matrices, "weight_decay": config.weight_decay})
    else:
        plain = [{"params": matrices + vectors, "weight_decay": 0.0}]
    plain = [group for group in plain if group["params"]]
    if not galore:
        return torch.optim.AdamW(plain, lr=config.peak_lr, fused=True)
    from fullrank.optim import GaLoreAdamW

    low_rank = {
        "params": projected,
        "rank": config.rank,
        "update_proj_gap": config.update_proj_gap,
        "scale": config.scale,
        "lr": config.peak_lr / config.scale,
        # Decay is a share of the weight, so it keeps the rate that was asked for.
        "weight_decay": config.weight_decay * config.scale,
    }
    groups = [low_rank, *plain] if projected else plain
    # The exact SVD costs too much for a short run; iteration finds the same subspace.
    return GaLoreAdamW(groups, lr=config.peak_lr, refresh="subspace", nonfinite="raise")


def _linear_weights(model: nn.Module) -> Iterator[Tensor]:
    for _, module in named_linears(model):
        yield module.weight  # type: ignore[misc]


@dataclass(frozen=True)
class StateMemory:
    """What an optimizer's state took, beside what AdamW's would have taken.

    Attributes
    ----------
    optimizer
        Its name.
    peak_bytes
        Most bytes that the tensors of its state had, counted after the steps.
    trained
        Numbers that were trained (those that got a gradient).
    frozen
        Numbers of the model that were not.
    projected
        Numbers in matrices whose moments are in a subspace.

    Examples
    --------
    >>> memory = StateMemory("galore_adamw", 3_000_000, trained=1_000_000, frozen=0,
    ...                      projected=900_000)
    >>> memory.adamw_bytes, memory.share
    (8000000, 0.375)
    """

    optimizer: str
    peak_bytes: int
    trained: int
    frozen: int
    projected: int

    @property
    def adamw_bytes(self) -> int:
        """AdamW's two float32 moments over the same parameters."""
        return _ADAMW_BYTES * self.trained

    @property
    def adamw_bytes_unfrozen(self) -> int:
        """AdamW's moments if nothing were frozen."""
        return _ADAMW_BYTES * (self.trained + self.frozen)

    @property
    def share(self) -> float:
        """Peak bytes as a share of AdamW's over the same parameters."""
        return self.peak_bytes / max(self.adamw_bytes, 1)

    def table(self) -> Table:
        """Return it as a table in MiB."""
        mib = 2**20
        rows: list[list[Cell]] = [
            [f"{self.optimizer} (measured)", self.trained, self.peak_bytes / mib, self.share],
            ["AdamW, same parameters", self.trained, self.adamw_bytes / mib, 1.0],
        ]
        if self.frozen:
            total = self.trained + self.frozen
            of_same = self.adamw_bytes_unfrozen / max(self.adamw_bytes, 1)
            rows.append(["AdamW, nothing frozen", total, self.adamw_bytes_unfrozen / mib, of_same])
        return Table(
            ["optimizer state", "trained numbers", "MiB", "of AdamW's"],
            rows,
            title="Peak optimizer-state memory",
            formats={"trained numbers": ",d", "MiB": ".1f", "of AdamW's": ".1%"},
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the derived ones with them."""
        return {
            **asdict(self),
            "adamw_bytes": self.adamw_bytes,
            "adamw_bytes_unfrozen": self.adamw_bytes_unfrozen,
            "share": self.share,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StateMemory:
        """Build it from what :meth:`to_json` gave."""
        names = ("optimizer", "peak_bytes", "trained", "frozen", "projected")
        return cls(**{name: values[name] for name in names})


def measure_state(
    optimizer: torch.optim.Optimizer, model: nn.Module, name: str, peak: int
) -> StateMemory:
    """Count the state after the last step; ``peak`` is the most seen after the steps before."""
    stated = [p for p, state in optimizer.state.items() if state]
    trained = sum(p.numel() for p in stated)
    projected = sum(
        p.numel()
        for group in optimizer.param_groups
        if group.get("rank") is not None
        for p in group["params"]
        if optimizer.state.get(p)
    )
    total = sum(p.numel() for p in model.parameters())
    return StateMemory(name, max(peak, state_bytes(optimizer)), trained, total - trained, projected)
