"""LoRA-GA: adapters whose first step is the best low-rank part of a full fine-tuning step.

``A`` and ``B`` start as singular vectors of the mean gradient of each weight, ``A`` and ``B`` with
different ones, and what they add at the start is taken out of the weight (arXiv 2407.05000). The
adapter stays PEFT's LoRA.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fullrank.adapters.bases import is_factorised
from fullrank.adapters.gradient_sketch import GradientSketch, sketches
from fullrank.adapters.gradients import (
    GradientSum,
    calibrating,
    check_size,
    fold_gradients,
    fold_step,
    loss_of,
)
from fullrank.adapters.layer_inputs import keep_dtype, lora_layers
from fullrank.adapters.lora_files import trained_beside
from fullrank.adapters.lora_ga_model import Mode, install, oriented, saves_for_the_base
from fullrank.adapters.lora_ga_start import (
    Direction,
    Scale,
    Start,
    start_from_gradient,
    start_from_triplets,
)
from fullrank.core.errors import InputError, require
from fullrank.core.names import canonical_name
from fullrank.core.table import Cell, Table

Estimate = Literal["auto", "exact", "sketch"]

# Whole gradients that take more are sketched by default.
_MOST_BYTES = 2**30


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
        Batches that the gradient is the mean of.
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
    dataloader: Iterable[Any] | Callable[[], Any],
    config: Any,
    *,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    gamma: float = 16.0,
    n_batches: int = 8,
    loss_fn: Callable[[nn.Module, Any], Tensor] = loss_of,
    grad_dtype: torch.dtype = torch.float32,
    mode: Mode = "residual",
    estimate: Estimate = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Any:
    """Put a LoRA adapter on a model, initialised by LoRA-GA.

    Parameters
    ----------
    model
        The base model. With ``mode="residual"`` weights of the target layers change: what the
        adapter adds at the start is taken out, so that the output stays.
    dataloader
        Batches with labels, or whatever ``loss_fn`` takes. Or, as PEFT's ``train_step``, a function
        that runs ``model`` on batches of its own and calls ``backward()`` on their losses; it is
        called once, and ``n_batches``, ``loss_fn`` and ``progress`` are not looked at.
    config
        A ``LoraConfig`` of linear layers; ``use_rslora=True`` is the paper's. Its
        ``init_lora_weights`` is not looked at. Ranks above half a layer's shorter side are lowered
        to it, with a warning.
    direction, scale, gamma
        See :func:`~fullrank.adapters.lora_ga_start.start_from_gradient`.
    n_batches
        Batches of the gradient estimate: 8, run in training mode.
    loss_fn
        ``(model, batch) -> loss``.
    grad_dtype
        Of the gradients' sums.
    mode
        ``"residual"`` (default, the paper's): what the adapter adds at the start is taken out of
        the weights; ``disable_adapter()`` and ``unload()`` give the base up to rounding.
        ``"subtract_init"``: the weights stay as they are, and each layer takes it
        from its output, for one more low-rank product a pass: exact for half-precision weights,
        and ``disable_adapter()`` is the base to the bit.
    estimate
        ``"exact"``: sums of whole gradients, one a layer, as large as the target weights in
        ``grad_dtype``. ``"sketch"``: gradients are folded into thin products as they come, so that
        there is one layer's gradient at a time; the directions are then nearly the best ones
        (97 % of what the best ones capture on all-MiniLM-L6-v2, rank 8). ``"auto"`` (default): a
        sketch where the sums would take more than 1 GiB.
    seed
        Of dropout while gradients are taken, of the sketch of large matrices and of
        ``direction="random"``.
    progress
        Show a bar.

    Returns
    -------
    PeftModel
        With ``model.lora_ga``, a :class:`LoraGAReport`. Its ``save_pretrained`` writes an ordinary
        LoRA of rank 2r for the base model as it was, since the adapter alone would not fit a fresh
        base, and beside it what a Trainer needs to go on from it. ``disable_adapter()`` gives what
        the base model computed, though its weights may have changed.

    Raises
    ------
    InputError
        On layers that are quantised or not linear, a loss that is not finite, an empty loader, a
        layer without a gradient, options that are none of those above or that are for more than
        factors of linear layers (``use_dora``, ``bias``), and, with ``mode="residual"``, a weight
        that another module has too. The model is then as it was.

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
        ("mode", mode, get_args(Mode)),
        ("estimate", estimate, get_args(Estimate)),
    ):
        if value not in known:
            raise InputError(f"{name}={value!r}; it is one of {', '.join(known)}")
    if n_batches < 1 or gamma <= 0:
        raise InputError(f"n_batches={n_batches}, gamma={gamma}; both are positive")
    scaled = ["use_dora"] if getattr(config, "use_dora", False) else []
    for name in [*trained_beside(config), *scaled]:
        # Modules that are trained as a whole are saved as a whole.
        if name != "modules_to_save":
            raise InputError(
                f"{name}={getattr(config, name)!r}: LoRA-GA starts and saves factors of linear "
                "layers, and nothing beside them; leave it out"
            )
    config = copy.copy(config)
    config.init_lora_weights = True
    asked = [(p, p.requires_grad) for p in model.parameters()]
    wrapped = peft.get_peft_model(model, config)
    adapter = "default"
    try:
        layers = lora_layers(wrapped, adapter)
        _check_layers(wrapped, layers)
        weights = {name: _weight(name, layer) for name, layer in layers.items()}
        if mode == "residual":
            _check_alone(wrapped, layers)
        for name, layer in layers.items():
            _lower_rank(name, layer, config)
        folds = _folds(layers, weights, estimate, grad_dtype, seed)
        with wrapped.disable_adapter(), calibrating(wrapped, seed):
            if callable(dataloader):
                seen = fold_step(wrapped, weights, folds, dataloader)
            else:
                seen = fold_gradients(
                    wrapped, weights, folds, dataloader, n_batches, loss_fn=loss_fn,
                    progress=progress,
                )  # fmt: skip
        starts, seconds = {}, {}
        options = {"direction": direction, "scale": scale, "gamma": gamma, "generator": seed}
        for name, layer in layers.items():
            began = time.perf_counter()
            starts[name] = _start(name, layer, folds.pop(name), seen, options)
            seconds[canonical_name(name)] = time.perf_counter() - began
    except BaseException:
        wrapped.unload()
        for parameter, wanted in asked:
            parameter.requires_grad_(wanted)
        raise
    for name, layer in layers.items():
        install(layer, starts[name], adapter, mode)
    wrapped.lora_ga = _report(layers, starts, seen, seconds)
    return saves_for_the_base(wrapped, adapter)


def _check_layers(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise where adapters are on layers that are not linear, which have no start."""
    tuner_layer = require("peft.tuners.tuners_utils", extra="adapters").BaseTunerLayer
    for name, module in model.named_modules():
        if isinstance(module, tuner_layer) and name not in layers:
            raise InputError(
                f"{canonical_name(name)} is a {type(module.get_base_layer()).__name__}; LoRA-GA is "
                "for linear layers (nn.Linear, Conv1D): leave it out of target_modules"
            )


def _check_alone(model: nn.Module, layers: Mapping[str, Any]) -> None:
    """Raise on weights that cannot be changed by themselves."""
    holders = Counter(
        id(held)
        for module in model.modules()
        for held in (*module._parameters.values(), *module._modules.values())
    )
    for name, layer in layers.items():
        base = layer.get_base_layer()
        if holders[id(base.weight)] > 1 or holders[id(base)] > 1:
            raise InputError(
                f"{canonical_name(name)} shares its weight with another module, which taking the "
                "start out of it would change too; use mode='subtract_init', or leave it out of "
                "target_modules"
            )


def _lower_rank(name: str, layer: Any, config: Any, adapter: str = "default") -> None:
    """``A`` and ``B`` take different singular vectors: a layer has them for half its width."""
    out, width = oriented(layer, layer.get_base_layer().weight).shape
    most, rank = min(out, width) // 2, int(layer.r[adapter])
    if rank <= most:
        return
    plain = canonical_name(name)
    if most == 0:
        raise InputError(f"{plain} is {out} x {width}, too narrow for LoRA-GA; leave it out")
    warnings.warn(
        f"{plain} is {out} x {width}: its rank is lowered from {rank} to {most}, since A and B "
        f"need {2 * rank} directions",
        stacklevel=3,
    )
    scaling, dtype = layer.scaling[adapter], layer.lora_A[adapter].weight.dtype
    layer.update_layer(adapter, most, layer.lora_alpha[adapter], config=config)
    layer.scaling[adapter] = scaling
    keep_dtype(layer, adapter, dtype)


def _folds(
    layers: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    estimate: Estimate,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, GradientSum | GradientSketch]:
    numbers = sum(weight.numel() for weight in weights.values())
    exact = estimate == "exact" or (estimate == "auto" and numbers * dtype.itemsize <= _MOST_BYTES)
    if exact:
        return {name: GradientSum(dtype) for name in layers}
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    ranks = {name: 2 * int(layer.r["default"]) for name, layer in layers.items()}
    device = next(iter(weights.values())).device
    return dict(sketches(shapes, ranks, seed, device, dtype))


def _start(
    name: str,
    layer: Any,
    fold: GradientSum | GradientSketch,
    seen: int,
    options: Mapping[str, Any],
) -> Start:
    rank, scaling = int(layer.r["default"]), layer.scaling["default"]
    weight = oriented(layer, layer.get_base_layer().weight.detach())
    if isinstance(fold, GradientSum):
        gradient = oriented(layer, fold.mean(seen))
        size = float(torch.linalg.vector_norm(gradient))
    else:
        U, S, Vh, size = fold.triplets(seen)
        if getattr(layer, "fan_in_fan_out", False):
            U, Vh = Vh.T, U.T
    check_size(name, size)
    try:
        if isinstance(fold, GradientSum):
            wide = weight.to(gradient.dtype)
            return start_from_gradient(gradient, rank, scaling, wide, **options)
        return start_from_triplets(U, S, Vh, size, rank, scaling, weight.to(U.dtype), **options)
    except InputError as error:
        raise InputError(f"{canonical_name(name)}: {error}") from error


def _report(
    layers: Mapping[str, Any],
    starts: Mapping[str, Start],
    batches: int,
    seconds: Mapping[str, float],
) -> LoraGAReport:
    return LoraGAReport(
        {canonical_name(n): len(starts[n].A) for n in layers},
        {canonical_name(n): starts[n].captured for n in layers},
        batches,
        {canonical_name(n): starts[n].A.numel() + starts[n].B.numel() for n in layers},
        seconds,
    )


def _weight(name: str, layer: Any) -> Tensor:
    if is_factorised(layer.get_base_layer()):
        raise InputError(
            f"{canonical_name(name)} is factorised; LoRA-GA changes the weight: put it on the "
            "dense model, or take lora or eva"
        )
    weight: Tensor = layer.get_base_layer().weight
    if not weight.is_floating_point():
        raise InputError(
            f"{canonical_name(name)} is quantised ({weight.dtype}); LoRA-GA changes the weight: "
            "load the model without quantisation"
        )
    return weight
