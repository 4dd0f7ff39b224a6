"""The methods that `adapt` knows: one row each, saying what it needs and how it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from fullrank.adapters import eva, lora_ga
from fullrank.adapters.gradients import loss_of
from fullrank.adapters.lora_files import exact_targets, exactly
from fullrank.core.errors import InputError, require

Needs = Literal["nothing", "weights", "activations", "gradients"]


@dataclass(frozen=True)
class Request:
    """What is asked of a method.

    Attributes
    ----------
    model
        The base model.
    ranks
        Name of each module to adapt -> rank.
    alpha
        Of the largest rank; None for the method's own. Layers of smaller ranks get the same
        scaling.
    dropout, task_type
        PEFT's.
    data
        Batches, for methods that need them.
    loss_fn, forward_fn
        ``(model, batch)``, or None for the model's own loss and call.
    transposed
        Whether the layers are transformers' ``Conv1D``.
    seed, progress
        Of sampling; whether bars are shown.
    """

    model: nn.Module
    ranks: Mapping[str, int]
    alpha: float | None
    dropout: float
    task_type: str | None
    data: Iterable[Any]
    loss_fn: Callable[[nn.Module, Any], Tensor] | None
    forward_fn: Callable[[nn.Module, Any], Any] | None
    transposed: bool
    seed: int
    progress: bool


@dataclass(frozen=True)
class Found:
    """What a method learnt, layer by layer, on its way."""

    explained: Mapping[str, float] = field(default_factory=dict)
    captured: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes
    ----------
    title
        What it is called.
    needs
        ``"nothing"``, ``"weights"`` (a decomposition of each), ``"activations"`` or
        ``"gradients"`` (both of which need data).
    start
        Makes the ``PeftModel``; its keyword arguments are the method's own options.
    optimizer
        The optimizer it is meant for, where that is a particular one.
    quantised
        Whether the base's weights may be quantised, or products of factors.
    rank
        Where none is asked for.
    planned
        Whether layers may have ranks of their own.
    """

    title: str
    needs: Needs
    start: Callable[..., tuple[Any, Found]]
    optimizer: str = ""
    quantised: bool = True
    rank: int = 8  # as in PEFT, and the rank most runs of the methods' papers include
    planned: bool = True


def lora_config(
    request: Request, options: Mapping[str, Any], *, alpha: float = 1.0, rslora: bool = False
) -> Any:
    """PEFT's ``LoraConfig`` for these ranks; ``alpha`` is per unit of rank unless asked for."""
    peft = require("peft", extra="adapters")
    patterns = patterns_of(request, alpha, 0.5 if rslora else 1.0)
    settings = {
        "lora_alpha": patterns.pop("alpha"),
        **patterns,
        "target_modules": targets_of(request),
        "lora_dropout": request.dropout,
        "task_type": request.task_type,
        "fan_in_fan_out": request.transposed,
        "use_rslora": rslora,
    }
    return _configured(peft.LoraConfig, settings, options)


def _configured(kind: Any, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """A configuration of what `adapt` was asked for, and of the method's own options."""
    for option in options:
        if option not in kind.__dataclass_fields__:
            raise InputError(f"{kind.__name__} has no {option!r}")
        if option in settings:
            raise InputError(
                f"{option} follows from the method and from rank, plan, alpha, dropout, targets "
                "and task_type; give those"
            )
    return kind(**settings, **options)


def targets_of(request: Request) -> list[str] | str:
    """``target_modules`` of PEFT for the layers that are asked for, and no others."""
    return exact_targets(request.ranks, [name for name, _ in request.model.named_modules()])


def patterns_of(request: Request, alpha: float, power: float = 1.0) -> dict[str, Any]:
    """``r``, ``alpha`` and their patterns for these ranks, at the same scaling in all layers.

    Parameters
    ----------
    request
        What is asked for.
    alpha
        Per unit of rank, unless asked for.
    power
        The scaling is alpha over this power of the rank.
    """
    largest = max(request.ranks.values())
    whole = request.alpha if request.alpha is not None else alpha * largest
    smaller = {exactly(n): rank for n, rank in request.ranks.items() if rank != largest}
    return {
        "r": largest,
        "alpha": whole,
        "rank_pattern": smaller,
        "alpha_pattern": {n: whole * (rank / largest) ** power for n, rank in smaller.items()},
    }


def _plain(
    alpha: float = 1.0, rslora: bool = False, **fixed: Any
) -> Callable[..., tuple[Any, Found]]:
    def start(request: Request, **options: Any) -> tuple[Any, Found]:
        return _tuned(
            request, lora_config(request, {**fixed, **options}, alpha=alpha, rslora=rslora)
        )

    return start


def _eva(
    request: Request,
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    whiten: bool = False,
    use_label_mask: bool = True,
    solver: eva.Solver = "gram",
    center: bool = True,
    max_batches: int = 64,
    min_tokens: int = 0,
) -> tuple[Any, Found]:
    peft = require("peft", extra="adapters")
    settings = peft.EvaConfig(rho=rho, tau=tau, whiten=whiten, use_label_mask=use_label_mask)
    config = lora_config(request, {"init_lora_weights": "eva", "eva_config": settings})
    model = peft.get_peft_model(request.model, config, low_cpu_mem_usage=True)
    report = eva.initialize(
        model,
        request.data,
        method=solver,
        center=center,
        max_batches=max_batches,
        min_tokens=min_tokens,
        forward_fn=request.forward_fn,
        progress=request.progress,
    )
    model.eva = report
    return model, Found(explained=report.explained, seconds=report.seconds)


def _lora_ga(
    request: Request,
    *,
    direction: Any = "ArB2r",
    scale: Any = "stable",
    gamma: float = 16.0,
    n_batches: int = 8,
    mode: Any = "residual",
    estimate: Any = "auto",
) -> tuple[Any, Found]:
    model = lora_ga.initialize(
        request.model,
        request.data,
        lora_config(request, {}, alpha=2.0, rslora=True),
        direction=direction,
        scale=scale,
        gamma=gamma,
        n_batches=n_batches,
        mode=mode,
        estimate=estimate,
        loss_fn=request.loss_fn or loss_of,
        seed=request.seed,
        progress=request.progress,
    )
    return model, Found(captured=model.lora_ga.captured, seconds=model.lora_ga.seconds)


def _lora_sb(
    request: Request,
    *,
    lr: float | None = None,
    n_samples: int = 50,
    core_dtype: Any = None,
) -> tuple[Any, Found]:
    peft = require("peft", extra="adapters")
    lora_sb = require("fullrank.adapters.lora_sb", extra="adapters")
    if lr is None:
        raise InputError(
            "LoRA-SB needs lr, the learning rate of the first optimizer step: the peak rate "
            "divided by the number of warm-up steps"
        )
    config = lora_sb.LoraSBConfig(
        **patterns_of(request, 1.0),
        **_shared(request),
        core_dtype=core_dtype,
    )
    model = peft.get_peft_model(request.model, config)
    model.lora_sb = lora_sb.initialize(
        model,
        request.data,
        lr,
        n_samples,
        loss_fn=request.loss_fn,
        seed=request.seed,
        progress=request.progress,
    )
    return model, Found(captured=model.lora_sb.captured, seconds=model.lora_sb.seconds)


def _flylora(request: Request, **options: Any) -> tuple[Any, Found]:
    flylora = require("fullrank.adapters.flylora", extra="adapters")
    settings = {**patterns_of(request, 2.0), **_shared(request)}
    # A token takes a quarter of the experts, as in the paper.
    chosen = {"k": max(1, settings["r"] // 4), "seed": request.seed, **options}
    return _tuned(request, _configured(flylora.FlyLoraConfig, settings, chosen))


def _hydra(request: Request, **options: Any) -> tuple[Any, Found]:
    hydra = require("fullrank.adapters.hydra", extra="adapters")
    patterns = patterns_of(request, 1.0)
    parallel, sequential = _halves(patterns["r"])
    halves = {name: _halves(rank) for name, rank in patterns["rank_pattern"].items()}
    scale = 1.0 if request.alpha is None else request.alpha / patterns["r"]
    settings = {
        "r": None,
        "r_parallel": parallel,
        "r_sequential": sequential,
        "alpha": scale * max(parallel, sequential),
        "parallel_pattern": {name: p for name, (p, _) in halves.items()},
        "sequential_pattern": {name: s for name, (_, s) in halves.items()},
        "alpha_pattern": {name: scale * max(both) for name, both in halves.items()},
        **_shared(request),
    }
    return _tuned(request, _configured(hydra.HydraConfig, settings, options))


def _halves(rank: int) -> tuple[int, int]:
    """Ranks of the parallel and the sequential branch of an update of so much rank."""
    return rank - rank // 2, rank // 2


def _shared(request: Request) -> dict[str, Any]:
    return {
        "target_modules": targets_of(request),
        "dropout": request.dropout,
        "task_type": request.task_type,
    }


def _tuned(request: Request, config: Any) -> tuple[Any, Found]:
    return require("peft", extra="adapters").get_peft_model(request.model, config), Found()


def _randlora(request: Request, **options: Any) -> tuple[Any, Found]:
    randlora = require("fullrank.adapters.randlora", extra="adapters")
    r, chosen = max(request.ranks.values()), {"projection_key": request.seed, **options}
    settings = {"r": r, "alpha": request.alpha, **_shared(request)}
    return _tuned(request, _configured(randlora.RandLoraConfig, settings, chosen))


METHODS: Mapping[str, Method] = {
    "lora": Method("LoRA", "nothing", _plain()),
    "rslora": Method("rank-stabilised LoRA", "nothing", _plain(rslora=True)),
    "dora": Method("DoRA", "nothing", _plain(use_dora=True)),
    "pissa": Method("PiSSA", "weights", _plain(init_lora_weights="pissa"), quantised=False),
    "eva": Method("EVA", "activations", _eva),
    "lora_ga": Method("LoRA-GA", "gradients", _lora_ga, quantised=False),
    "gradnormlorp": Method(
        "GradNormLoRP's adapter (DoRA)",
        "nothing",
        _plain(alpha=2.0, use_dora=True),
        "fullrank.optim.GradNormLoRPAdamW, with A and B in a group that has a rank",
    ),
    # r^2 numbers a layer: LoRA-SB's r is larger, from 24 in the paper.
    "lora_sb": Method("LoRA-SB", "gradients", _lora_sb, quantised=False, rank=32),
    # FlyLoRA's r are experts of rank 1, of which a token takes some; Hydra's is shared by a branch
    # on the layer's input and one on its output.
    "flylora": Method("FlyLoRA", "nothing", _flylora, rank=32),
    "hydra": Method("Hydra", "nothing", _hydra),
    # RandLoRA's r is the rank of one of many bases: 32 in PEFT, and a smaller one trains more.
    "randlora": Method("RandLoRA", "nothing", _randlora, rank=32, planned=False),
}
"""Name -> method; a new one is a new row."""
