"""WeLore: as much rank to each matrix as its spectrum has, and fine-tuning of the low-rank ones.

Jaiswal et al., "From GaLore to WeLore", 2024, arXiv 2407.11239. Singular values of each matrix are
put on a scale from 0 to 1; one threshold for the whole model drops what lies below it. Matrices
that lose more than half of their directions have a heavy tail: these low-rank components (LRCs)
are factorised, and they are what is fine-tuned; all others stay as they are. No data is needed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from fullrank.compress.factorization import factorize
from fullrank.compress.layers_record import Factorised, factorised
from fullrank.compress.matrices import matricise
from fullrank.compress.planning import entry_for, layer_spectra
from fullrank.compress.rules_threshold import (
    NormalisedThreshold,
    effective_reduction,
    solve_for_reduction,
)
from fullrank.compress.targets import Patterns
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_modules, model_fingerprint
from fullrank.core.plan import PlanEntry, RankPlan
from fullrank.core.rank_rules import LayerSpectrum
from fullrank.core.table import Cell, Table


@dataclass(frozen=True)
class WeLoreConfig:
    """How to compress.

    Parameters
    ----------
    target_reduction
        Effective rank reduction in [0, 1): the share of all directions that lies below the
        threshold. What is really saved is less, since matrices that lose few directions stay
        dense. The default of 0.5 is the paper's headline setting; None with ``theta``.
    theta
        The threshold itself, in [0, 1], in place of a target: 0.175 for nominally half of
        LLaMA-2 7B in the official scripts.
    lrc_ratio
        A matrix is a low-rank component if it loses more than this share of its directions: more
        than half (section 3; the official fine-tuning scripts say 0.4999, their study of rank
        reduction alone 0).
    include
        Name patterns; by default the projections of LLaMA-like models. Convolutions are read by
        channels (not in the paper).
    train_norms
        Whether :func:`mark_trainable` leaves normalisation layers trainable, as the official
        code does.
    """

    target_reduction: float | None = 0.5
    theta: float | None = None
    lrc_ratio: float = 0.5
    include: Patterns = ("*_proj",)
    train_norms: bool = True

    def __post_init__(self) -> None:
        if self.theta is None and self.target_reduction is None:
            raise InputError("WeLoreConfig takes target_reduction= or theta=")
        target = self.target_reduction
        if self.theta is None and target is not None and not 0 <= target < 1:
            raise InputError(f"target_reduction {target}; it lies in [0, 1)")
        if self.theta is not None and not 0 <= self.theta <= 1:
            raise InputError(f"theta {self.theta}; it lies in [0, 1]")
        if not 0 <= self.lrc_ratio < 1:
            raise InputError(f"lrc_ratio {self.lrc_ratio}; it lies in [0, 1)")


@dataclass(frozen=True)
class WeLoreReport:
    """What was decided and done.

    Attributes
    ----------
    plan
        A rank for each low-rank component, None for the rest. Of every layer the options say
        ``"lrc"`` and ``"kept"``, the directions at or above the threshold.
    theta
        The threshold.
    nominal_reduction
        Share of all directions below the threshold: what ``target_reduction`` asks for.
    reduction
        Share that low-rank components lose: what was really dropped.
    kept
        Share of these layers' parameters that is left.
    bytes_before, bytes_after
        Of the whole model's parameters.
    table
        A row a layer.
    """

    plan: RankPlan
    theta: float
    nominal_reduction: float
    reduction: float
    kept: float
    bytes_before: int
    bytes_after: int
    table: Table

    def __str__(self) -> str:
        return (
            f"{self.table}\ntheta {self.theta:.4g}: {self.nominal_reduction:.1%} of all directions "
            f"lie below it, {self.reduction:.1%} were dropped; {self.kept:.1%} of the layers' "
            f"parameters and {self.bytes_after / self.bytes_before:.1%} of the model's bytes left"
        )


def welore_plan(
    model: nn.Module,
    config: WeLoreConfig,
    spectra: Mapping[str, LayerSpectrum] | None = None,
) -> RankPlan:
    """Find the low-rank components and their ranks; nothing in the model changes.

    Parameters
    ----------
    model
        Any module with layers that ``config.include`` names.
    config
        Threshold or target.
    spectra
        From :func:`~fullrank.compress.layer_spectra`, to plan several times at the price of once.

    Raises
    ------
    InputError
        When no layer is named so, a weight is not finite, or no threshold reaches the target.

    Examples
    --------
    >>> import torch
    >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 8)})
    >>> with torch.no_grad():
    ...     _ = model["q_proj"].weight.copy_(torch.diag(torch.tensor([8.0, 4, 1, 1, 1, 1, 1, 1])))
    ...     _ = model["k_proj"].weight.copy_(torch.diag(torch.arange(8.0, 16.0)))
    >>> [entry.rank for entry in welore_plan(model, WeLoreConfig(theta=0.2)).values()]
    [2, None]
    """
    if spectra is None:
        spectra = layer_spectra(model, include=config.include)
    return _plan(model, config, spectra, _theta(config, spectra))


def welore_compress(
    model: nn.Module,
    config: WeLoreConfig | None = None,
    *,
    spectra: Mapping[str, LayerSpectrum] | None = None,
) -> tuple[nn.Module, WeLoreReport]:
    """Factorise a model's low-rank components in place: one shot, no data.

    Make the optimizer for fine-tuning afterwards, from what :func:`mark_trainable` leaves
    trainable.

    Parameters
    ----------
    model
        Changed in place.
    config, spectra
        See :func:`welore_plan`.

    Returns
    -------
    model, report
        The same model, and the plan with what it saved.

    Examples
    --------
    >>> import torch
    >>> model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 8)})
    >>> with torch.no_grad():
    ...     _ = model["q_proj"].weight.copy_(torch.diag(torch.tensor([8.0, 4, 1, 1, 1, 1, 1, 1])))
    >>> model, found = welore_compress(model, WeLoreConfig(theta=0.2))
    >>> found.plan["q_proj"].rank, model["q_proj"].rank
    (2, 2)
    """
    config = config or WeLoreConfig()
    if spectra is None:
        spectra = layer_spectra(model, include=config.include)
    theta = _theta(config, spectra)
    plan = _plan(model, config, spectra, theta)
    before = _bytes(model)
    factorize(model, plan, balance="sqrt")
    table = _table(plan, spectra, dict(factorised(model)))
    return model, WeLoreReport(
        plan,
        theta,
        effective_reduction(spectra, theta),
        _dropped(plan, spectra),
        plan.savings().kept,
        before,
        _bytes(model),
        table,
    )


def mark_trainable(model: nn.Module, train_norms: bool = True) -> list[str]:
    """Freeze everything but the factorised layers, and normalisation layers.

    Biases of factorised layers train with them. With gradient checkpointing, inputs are made to
    ask for gradients, as frozen embeddings would stop them.

    Parameters
    ----------
    model
        After :func:`welore_compress` (or any factorisation).
    train_norms
        Whether weights and biases of normalisation layers stay trainable, as in the official
        code.

    Returns
    -------
    list of str
        Names of the parameters that train.

    Raises
    ------
    InputError
        When the model has no factorised layer.
    """
    wanted: set[int] = set()
    for module in model.modules():
        if isinstance(module, Factorised) or (train_norms and _is_norm(module)):
            wanted.update(id(p) for p in module.parameters())
    if not any(True for _ in factorised(model)):
        raise InputError(
            "the model has no factorised layer to train; a smaller lrc_ratio or a larger target "
            "makes more low-rank components"
        )
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in wanted)
    inner: Any = model
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        inner.enable_input_require_grads()
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def _theta(config: WeLoreConfig, spectra: Mapping[str, LayerSpectrum]) -> float:
    if config.theta is not None:
        return config.theta
    return solve_for_reduction(spectra, config.target_reduction or 0.0)


def _plan(
    model: nn.Module,
    config: WeLoreConfig,
    spectra: Mapping[str, LayerSpectrum],
    theta: float,
) -> RankPlan:
    ranks = NormalisedThreshold(theta).ranks(spectra)
    modules = dict(canonical_modules(model))
    entries: dict[str, PlanEntry] = {}
    for name, seen in spectra.items():
        if name not in modules:
            raise InputError(f"the spectra are of another model: this one has no {name!r}")
        k = len(seen.values)
        kept = ranks[name] or k
        lrc = (k - kept) / k > config.lrc_ratio
        reason = f"{k - kept} of {k} directions below theta {theta:.4g}"
        scheme = matricise(modules[name]).scheme
        entry = entry_for(seen.shape, kept if lrc else None, "svd", reason, scheme, seen.stack)
        options = {**entry.options, "lrc": lrc, "kept": kept}
        entries[name] = PlanEntry(
            entry.shape, entry.rank, entry.method, entry.scheme, entry.reason, options
        )
    return RankPlan(entries, fingerprint=model_fingerprint(model))


def _dropped(plan: RankPlan, spectra: Mapping[str, LayerSpectrum]) -> float:
    full = sum(s.stack * len(s.values) for s in spectra.values())
    kept = sum(
        spectra[n].stack * (len(spectra[n].values) if e.rank is None else e.rank)
        for n, e in plan.items()
    )
    return 1 - kept / full


def _bytes(model: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def _table(
    plan: RankPlan, spectra: Mapping[str, LayerSpectrum], layers: Mapping[str, Factorised]
) -> Table:
    rows: list[list[Cell]] = []
    for name, entry in plan.items():
        error = layers[name].error if name in layers else 0.0
        rows.append(
            [
                name,
                len(spectra[name].values),
                entry.options["kept"],
                entry.rank,
                entry.size("factor") / entry.dense_size,
                error,
                "LRC" if entry.options["lrc"] else "dense",
                entry.reason,
            ]
        )
    return Table(
        ["layer", "k", "kept", "rank", "parameters", "spectrum lost", "class", "reason"],
        rows,
        title="WeLore",
        formats={"parameters": ".1%", "spectrum lost": ".2%"},
    )
