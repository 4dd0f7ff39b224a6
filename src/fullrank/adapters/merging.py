"""Several adapters as one: the weighted sum of their updates, factorised again.

Sums updates ``B_i A_i``, never factors: the mean of the ``B`` times the mean of the ``A`` has
cross terms that no task asked for. The sum of products is the product of stacked factors, so its
best approximation of any rank comes from two thin QRs and the SVD of a small core, without ever
forming a matrix of the weight's size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fullrank.adapters.export import to_lora
from fullrank.adapters.lora_files import LowRank, exact_targets, trained_beside
from fullrank.adapters.lora_ga_model import changed_base
from fullrank.core.errors import InputError, require
from fullrank.core.table import Cell, Table
from fullrank.linalg.checks import all_finite


@dataclass(frozen=True)
class MergeReport:
    """What a merge kept, layer by layer.

    Attributes
    ----------
    updates
        Name of a module of the base model -> the merged update.
    lost
        Name -> Frobenius norm of what the rank cut off, over that of the whole sum.
    """

    updates: Mapping[str, LowRank]
    lost: Mapping[str, float]

    def table(self) -> Table:
        """Return a row a layer: its rank and the share lost."""
        rows: list[list[Cell]] = [
            [name, len(update.A), self.lost[name]] for name, update in self.updates.items()
        ]
        return Table(["layer", "rank", "lost"], rows, title="Merged adapters")


def merge_updates(
    adapters: Sequence[Mapping[str, LowRank]],
    weights: Sequence[float] | None = None,
    rank: int | None = None,
) -> MergeReport:
    """Return the weighted sum of low-rank updates, factorised to a rank.

    Parameters
    ----------
    adapters
        For each adapter, name of a module of the base model -> update, as
        :func:`fullrank.adapters.export.to_lora` returns it. A layer that one does not have
        counts as zero there.
    weights
        One an adapter; 1 / (number of adapters) by default.
    rank
        Largest rank of a merged layer; None for the sum of theirs, which loses nothing.

    Raises
    ------
    InputError
        When there is nothing to merge, weights or rank are not what they should be, or the
        adapters are for different base models.

    Examples
    --------
    >>> one = {"fc": LowRank(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))}
    >>> two = {"fc": LowRank(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0], [1.0]]))}
    >>> A, B = merge_updates([one, two], [3.0, 4.0]).updates["fc"]
    >>> (B @ A).abs()
    tensor([[3., 0.],
            [0., 4.]])
    >>> merge_updates([one, two], [3.0, 4.0], rank=1).lost
    {'fc': 0.6...}
    """
    shares = _shares(len(adapters), weights)
    if rank is not None and rank < 1:
        raise InputError(f"rank={rank}; it is at least 1, or None to lose nothing")
    _check_base(adapters)
    updates, lost = {}, {}
    for name in dict.fromkeys(name for adapter in adapters for name in adapter):
        parts = [
            LowRank(adapter[name].A, share * adapter[name].B)
            for adapter, share in zip(adapters, shares, strict=True)
            if name in adapter
        ]
        updates[name], lost[name] = _factorised(parts, rank)
    return MergeReport(updates, lost)


def merge_adapters(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    into: str = "merged",
    rank: int | None = None,
) -> MergeReport:
    """Add to a PEFT model one adapter that is the weighted sum of several.

    Parameters
    ----------
    model
        A ``PeftModel`` of LoRA adapters, or of FlyLoRA ones: these stay side by side in the merged
        one, which loses nothing. Ranks, scalings and layers may differ.
    adapters
        Names of those to merge. They stay as they are, and the active one stays active.
    weights
        One an adapter; 1 / (number of adapters) by default.
    into
        Name of the new adapter.
    rank
        Largest rank of a merged layer; None for the sum of theirs, which loses nothing.

    Raises
    ------
    InputError
        As :func:`merge_updates` and :func:`fullrank.adapters.export.to_lora`, when a name is
        taken or given twice, the adapters are not LoRA or come with biases or modules that were
        trained whole, or LoRA-GA changed the base weights. The model is then as it was.

    Examples
    --------
    >>> report = merge_adapters(model, ["gsm8k", "code"], rank=16)  # doctest: +SKIP
    >>> model.set_adapter("merged")  # doctest: +SKIP
    """
    peft = require("peft", extra="adapters")
    configs: Mapping[str, Any] = getattr(model, "peft_config", {})
    names = list(adapters)
    if len(set(names)) < len(names):
        raise InputError(f"adapters={names}; each is named once, use weights to repeat one")
    if not into or into in configs:
        raise InputError(f"into={into!r}; it is the name of a new adapter")
    for name in names:
        _check_alone(name, configs.get(name))
    kinds = {configs[name].peft_type.value for name in names if name in configs}
    if kinds == {"FULLRANK_FLYLORA"}:
        return _side_by_side(model, names, weights, into, rank)
    for name in names:
        if name in configs and configs[name].peft_type != peft.PeftType.LORA:
            raise InputError(
                f"{name!r} is a {configs[name].peft_type.value} adapter; merge_adapters puts LoRA "
                "or FlyLoRA ones together. Use merge_updates on their low-rank updates, or "
                "merge_and_unload"
            )
    if any(changed_base(module) for module in model.modules()):
        # Updates are of the weights as they were; a new adapter here would add to changed ones.
        raise InputError(
            "LoRA-GA changed this model's base weights; write its adapters with save_as_lora, "
            "load them on a fresh base model, and merge there (or start it with "
            "mode='subtract_init')"
        )
    report = merge_updates([to_lora(model, name) for name in names], weights, rank)
    ranks = {name: len(update.A) for name, update in report.updates.items()}
    patterns = {f"^{name}$".replace(".", r"\."): r for name, r in ranks.items()}
    first = configs[names[0]]
    base: Any = model.base_model.model  # type: ignore[union-attr]
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=exact_targets(ranks, dict(base.named_modules())),
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        task_type=first.task_type,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        fan_in_fan_out=first.fan_in_fan_out,
        init_lora_weights=False,
    )
    model.add_adapter(into, config)  # type: ignore[operator]
    for name, update in report.updates.items():
        layer = base.get_submodule(name)
        with torch.no_grad():
            layer.lora_A[into].weight.copy_(update.A)
            layer.lora_B[into].weight.copy_(update.B)
    return report


def _check_alone(name: str, config: Any) -> None:
    """Raise where more was trained than updates of linear layers, which are all that add up."""
    if beside := trained_beside(config):
        raise InputError(
            f"{name!r} was trained with {', '.join(beside)}, which the sum of updates would leave "
            "out; merge adapters of linear layers alone"
        )


def _side_by_side(
    model: Any, names: Sequence[str], weights: Sequence[float] | None, into: str, rank: int | None
) -> MergeReport:
    from fullrank.adapters import flylora

    if rank is not None:
        raise InputError("FlyLoRA's experts are not cut to a rank: which add up depends on tokens")
    merged = flylora.merge_adapters(model, names, weights, into)
    experts = {name: LowRank(part.A, part.scale * part.B) for name, part in merged.items()}
    return MergeReport(experts, dict.fromkeys(experts, 0.0))


def _factorised(parts: Sequence[LowRank], rank: int | None) -> tuple[LowRank, float]:
    """Sum ``B_i A_i`` to at most this rank, the singular values shared between both factors."""
    dtype = parts[0].A.dtype
    wide = torch.promote_types(dtype, torch.float32)
    A = torch.cat([part.A.to(wide) for part in parts])
    B = torch.cat([part.B.to(A) for part in parts], dim=1)
    if not (all_finite(A) and all_finite(B)):
        raise InputError("an adapter holds numbers that are not finite; was its training stable?")
    left, upper = torch.linalg.qr(B)
    right, lower = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    kept = min(rank or len(S), len(S))
    whole = float(torch.linalg.vector_norm(S))
    gone = float(torch.linalg.vector_norm(S[kept:]))
    root = S[:kept].sqrt()
    merged = LowRank(
        (root.unsqueeze(1) * (Vh[:kept] @ right.T)).to(dtype),
        ((left @ U[:, :kept]) * root).to(dtype),
    )
    return merged, gone / whole if whole else 0.0


def _shares(count: int, weights: Sequence[float] | None) -> list[float]:
    if not count:
        raise InputError("there is no adapter to merge; name at least one")
    if weights is None:
        return [1 / count] * count
    if len(weights) != count or not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"weights={list(weights)}; {count} finite numbers are needed")
    return [float(weight) for weight in weights]


def _check_base(adapters: Sequence[Mapping[str, LowRank]]) -> None:
    """Raise where the layers of two adapters cannot be those of one base model."""
    shapes: dict[str, tuple[int, int]] = {}
    for number, adapter in enumerate(adapters):
        if not adapter:
            raise InputError(f"adapter {number} has no layer to merge")
        for name, (A, B) in adapter.items():
            shape = (B.shape[0], A.shape[1])
            if shapes.setdefault(name, shape) != shape:
                raise InputError(
                    f"adapter {number} is for another base model: {name} is {shape} in it and "
                    f"{shapes[name]} in the ones before it"
                )
