"""LoRA-GA: adapters whose first step is the best low-rank part of a full fine-tuning step.

``A`` and ``B`` start as singular vectors of the mean gradient of each weight, ``A`` and ``B`` with
different ones, and what they add at the start is taken out of the weight (arXiv 2407.05000). The
adapter stays PEFT's LoRA.
"""

from __future__ import annotations

import time
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fullrank.adapters.gradients import loss_of, mean_gradients
from fullrank.adapters.layer_inputs import lora_layers
from fullrank.adapters.lora_files import LowRank, update_of, write_lora
from fullrank.adapters.lora_ga_start import Direction, Scale, Start, start_from_gradient
from fullrank.core.errors import InputError, require
from fullrank.core.names import canonical_name
from fullrank.core.table import Cell, Table


@dataclass(frozen=True)
class LoraGAReport:
    """What LoRA-GA found.

    Attributes
    ----------
    ranks
        Layer -> rank.
    captured
        Layer -> share of the gradient's norm that the first step follows.
    batches
        Batches that the gradient is the mean of, at most.
    parameters
        Layer -> trained numbers.
    seconds
        Layer -> time of its decomposition.
    """

    ranks: Mapping[str, int]
    captured: Mapping[str, float]
    batches: int
    parameters: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)

    def table(self) -> Table:
        """Return a row a layer."""
        rows: list[list[Cell]] = [
            [name, rank, self.captured[name], self.parameters[name]]
            for name, rank in self.ranks.items()
        ]
        return Table(
            ["layer", "rank", "captured gradient", "parameters"],
            rows,
            title=f"LoRA-GA, gradients of {self.batches} batches",
            formats={"captured gradient": ".1%", "parameters": ",d"},
        )


def initialize(
    model: nn.Module,
    data: Iterable[Any],
    config: Any,
    *,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    gamma: float = 16.0,
    n_batches: int = 8,
    loss_fn: Callable[[nn.Module, Any], Tensor] = loss_of,
    grad_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """Put a LoRA adapter on a model, initialised by LoRA-GA.

    Parameters
    ----------
    model
        The base model. Weights of the target layers change: what the adapter adds at the start is
        taken out, so that the output stays.
    data
        Batches with labels, or whatever ``loss_fn`` takes.
    config
        A ``LoraConfig``; ``use_rslora=True`` is the paper's. Its ``init_lora_weights`` is not
        looked at. Ranks above half a layer's shorter side are lowered to it, with a warning.
    direction, scale, gamma
        See :func:`~fullrank.adapters.lora_ga_start.start_from_gradient`.
    n_batches
        Batches of the gradient estimate: 8.
    loss_fn
        ``(model, batch) -> loss``.
    grad_dtype
        Of the gradients' sums.
    seed
        Of the sketch of large matrices and of ``direction="random"``.
    progress
        Show a bar.

    Returns
    -------
    PeftModel
        With ``model.lora_ga``, a :class:`LoraGAReport`. Its ``save_pretrained`` writes an ordinary
        LoRA of rank 2r for the base model as it was, since the adapter alone would not fit a fresh
        base. ``disable_adapter()`` gives what the base model computed, though its weights changed.

    Raises
    ------
    InputError
        On quantised layers, a loss that is not finite, an empty loader, a layer without a
        gradient, options that are none of those above. The model is then as it was.

    Examples
    --------
    >>> from fullrank.adapters import lora_ga
    >>> config = LoraConfig(r=8, use_rslora=True)  # doctest: +SKIP
    >>> tuned = lora_ga.initialize(model, loader, config)  # doctest: +SKIP
    """
    peft = require("peft", extra="adapters")
    for name, value, known in (
        ("direction", direction, get_args(Direction)),
        ("scale", scale, get_args(Scale)),
    ):
        if value not in known:
            raise InputError(f"{name}={value!r}; it is one of {', '.join(known)}")
    if n_batches < 1 or gamma <= 0:
        raise InputError(f"n_batches={n_batches}, gamma={gamma}; both are positive")
    config = peft.LoraConfig(**{**config.to_dict(), "init_lora_weights": True})
    config.peft_type = peft.PeftType.LORA
    asked = [(p, p.requires_grad) for p in model.parameters()]
    wrapped = peft.get_peft_model(model, config)
    adapter = "default"
    try:
        layers = lora_layers(wrapped, adapter)
        weights = {name: _weight(name, layer) for name, layer in layers.items()}
        with wrapped.disable_adapter():
            gradients = mean_gradients(
                wrapped,
                weights,
                data,
                n_batches,
                loss_fn=loss_fn,
                dtype=grad_dtype,
                progress=progress,
            )
        starts, seconds = {}, {}
        for name, layer in layers.items():
            began = time.perf_counter()
            starts[name] = _start(name, layer, gradients.pop(name), direction, scale, gamma, seed)
            seconds[canonical_name(name)] = time.perf_counter() - began
    except BaseException:
        wrapped.unload()
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
        raise
    for name, layer in layers.items():
        _install(layer, starts[name], adapter)
    return _finished(wrapped, layers, starts, n_batches, seconds)


def _start(
    name: str,
    layer: Any,
    gradient: Tensor,
    direction: Direction,
    scale: Scale,
    gamma: float,
    seed: int,
) -> Start:
    gradient = _oriented(layer, gradient)
    weight = _oriented(layer, layer.get_base_layer().weight.detach()).to(gradient.dtype)
    most = min(gradient.shape) // 2
    rank = int(layer.r["default"])
    if rank > most:
        warnings.warn(
            f"{canonical_name(name)} is {gradient.shape[0]} x {gradient.shape[1]}: its rank is "
            f"lowered from {rank} to {most}, since A and B need {2 * rank} directions",
            stacklevel=4,
        )
        if most == 0:
            raise InputError(f"{canonical_name(name)} is too narrow for LoRA-GA; leave it out")
        scaling = layer.scaling["default"]
        layer.update_layer("default", most, layer.lora_alpha["default"], config=_of(layer))
        layer.scaling["default"] = scaling
        rank = most
    if not (torch.isfinite(gradient).all() and gradient.abs().max() > 0):
        raise InputError(
            f"the gradient of {canonical_name(name)} is zero or not finite; give other batches, or "
            "leave it out"
        )
    try:
        return start_from_gradient(
            gradient,
            rank,
            layer.scaling["default"],
            weight,
            direction=direction,
            scale=scale,
            gamma=gamma,
            generator=seed,
        )
    except InputError as error:
        raise InputError(f"{canonical_name(name)}: {error}") from error


@torch.no_grad()
def _install(layer: Any, start: Start, adapter: str) -> None:
    """Set the factors, and take out of the weight exactly what the stored ones add."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    A.copy_(start.A)
    B.copy_(start.B)
    weight = layer.get_base_layer().weight
    wide = torch.promote_types(weight.dtype, torch.float32)
    offset = layer.scaling[adapter] * (B.to(wide) @ A.to(wide))
    weight.copy_(weight.to(wide) - _oriented(layer, offset))


def _finished(
    model: Any,
    layers: Mapping[str, Any],
    starts: Mapping[str, Start],
    batches: int,
    seconds: Mapping[str, float],
    adapter: str = "default",
) -> Any:
    first = {name: update_of(layer, adapter) for name, layer in layers.items()}
    model.lora_ga = LoraGAReport(
        {canonical_name(n): len(s.A) for n, s in starts.items()},
        {canonical_name(n): s.captured for n, s in starts.items()},
        batches,
        {canonical_name(n): s.A.numel() + s.B.numel() for n, s in starts.items()},
        seconds,
    )

    def save_pretrained(self: Any, save_directory: str | Path, **_: Any) -> None:
        updates = {
            _base_name(name): _difference(update_of(layer, adapter), first[name])
            for name, layer in lora_layers(self, adapter).items()
        }
        write_lora(save_directory, updates, self.peft_config[adapter])

    for name, layer in layers.items():
        layer.register_forward_hook(_Original(first[name]))
    model.save_pretrained = types.MethodType(save_pretrained, model)
    return model


def start_of(layer: nn.Module) -> LowRank | None:
    """What LoRA-GA took out of a layer's weight, or None where it did not."""
    hooks = layer._forward_hooks.values()
    return next((hook.first for hook in hooks if isinstance(hook, _Original)), None)


class _Original:
    """A forward hook: with the adapter off, a layer computes what it did before it was changed."""

    def __init__(self, first: LowRank) -> None:
        self.first = first

    def __call__(self, layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if not layer.disable_adapters:
            return None
        x: Tensor = inputs[0]
        A, B = (factor.to(x) for factor in self.first)
        return output + x @ A.T @ B.T


def _difference(now: LowRank, first: LowRank) -> LowRank:
    """``B A - B_0 A_0`` as one product of twice the rank."""
    A = torch.cat([now.A, first.A.to(now.A)])
    return LowRank(A, torch.cat([now.B, -first.B.to(now.B)], dim=1))


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.")


def _weight(name: str, layer: Any) -> Tensor:
    weight: Tensor = layer.get_base_layer().weight
    if not weight.is_floating_point():
        raise InputError(
            f"{canonical_name(name)} is quantised ({weight.dtype}); LoRA-GA changes the weight: "
            "load the model without quantisation"
        )
    return weight


def _oriented(layer: Any, matrix: Tensor) -> Tensor:
    """``(out, in)``: Conv1D stores the transpose."""
    return matrix.T if getattr(layer, "fan_in_fan_out", False) else matrix


def _of(layer: Any) -> Any:
    peft = require("peft", extra="adapters")
    return peft.LoraConfig(init_lora_weights=True, use_rslora=layer.use_rslora.get("default"))
