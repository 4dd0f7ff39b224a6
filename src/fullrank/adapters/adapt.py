"""`adapt`: any adapter on any model, with what the method needs run and reported."""

from __future__ import annotations

import copy
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fullrank.adapters.adapt_methods import METHODS, Found, Method, Request
from fullrank.adapters.bases import is_conv1d, is_factorised, is_linear, shape_of
from fullrank.core.errors import InputError, PlanError, require
from fullrank.core.names import canonical_name
from fullrank.core.plan import RankPlan
from fullrank.core.table import Cell, Table

# Tensor subclasses of torchao that say they hold floating-point numbers.
_QUANTISED = ("AffineQuantizedTensor", "LinearActivationQuantizedTensor", "Int4Tensor")
# What an adapter leaves out by default: heads, which PEFT trains whole, and poolers, which
# sentence embeddings do not depend on.
_LEFT_OUT = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
    "FEATURE_EXTRACTION": ("pooler",),
}


@dataclass(frozen=True)
class LayerReport:
    """One layer: its rank, what the start explains or captures, what is trained, the time."""

    name: str
    rank: int
    explained: float | None
    captured: float | None
    parameters: int
    seconds: float | None


@dataclass(frozen=True)
class AdaptReport:
    """What `adapt` did.

    Attributes
    ----------
    method
        Its name in the table of methods.
    layers
        One :class:`LayerReport` each.
    seconds
        Of everything, forward and backward passes included.
    optimizer
        The optimizer that the method is meant for, where that is a particular one.
    """

    method: str
    layers: tuple[LayerReport, ...]
    seconds: float
    optimizer: str = ""

    @property
    def parameters(self) -> int:
        """Trainable numbers in the adapted layers."""
        return sum(layer.parameters for layer in self.layers)

    def table(self) -> Table:
        """Return a row a layer."""
        columns = ["layer", "rank", "explained variance", "captured gradient", "trained", "seconds"]
        rows: list[list[Cell]] = [
            [x.name, x.rank, x.explained, x.captured, x.parameters, x.seconds] for x in self.layers
        ]
        title = f"{METHODS[self.method].title}: {self.parameters:,} trained, {self.seconds:.1f} s"
        formats = dict(zip(columns[2:], [".1%", ".1%", ",d", ".3f"], strict=True))
        return Table(columns, rows, title, formats)


def adapt(
    model: nn.Module,
    method: str = "lora",
    plan: RankPlan | None = None,
    rank: int | None = None,
    data: Iterable[Any] | None = None,
    *,
    targets: str | Sequence[str] | None = None,
    alpha: float | None = None,
    dropout: float = 0.0,
    task_type: str | None = None,
    loss_fn: Callable[[nn.Module, Any], Tensor] | None = None,
    forward_fn: Callable[[nn.Module, Any], Any] | None = None,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Any:
    """Put an adapter on a model and start it as its method says.

    Parameters
    ----------
    model
        The base model; an ordinary module.
    method
        ``"lora"``, ``"rslora"``, ``"dora"``, ``"pissa"`` (PEFT's), ``"eva"``, ``"lora_ga"``,
        ``"lora_sb"``, ``"flylora"``, ``"hydra"``, ``"gradnormlorp"`` (DoRA for
        ``fullrank.optim.GradNormLoRPAdamW``), or ``"randlora"``.
    plan
        A rank for each layer: a :class:`~fullrank.core.RankPlan` of purpose ``"adapter"``. EVA
        keeps its ranks unless ``rho`` is given.
    rank
        The same rank for all instead; 8 when neither is given, for LoRA-SB, FlyLoRA and
        RandLoRA 32. Hydra shares it between its branches.
    data
        Batches: of the model's arguments (with labels for ``"lora_ga"`` and ``"lora_sb"``), or
        what ``forward_fn`` or ``loss_fn`` take. Methods that need none leave them alone.
    targets
        Which linear layers, factorised ones included: ends of names (``"query"``), or shell
        patterns over whole names; by
        default all but the output head, the classifier (``task_type="SEQ_CLS"``) and the pooler
        (``"FEATURE_EXTRACTION"``).
    alpha
        LoRA's, for the largest rank; by default a scaling of 1 (LoRA-GA: 2 r / sqrt(r), DoRA for
        GradNormLoRP: 2).
    dropout, task_type
        PEFT's ``lora_dropout`` and ``task_type``.
    loss_fn, forward_fn
        ``(model, batch)``: the loss of LoRA-GA and LoRA-SB, the forward pass of EVA.
    seed
        Of what is random.
    progress
        Show bars.
    **options
        The method's own; e.g. EVA: ``rho``, ``whiten``, ``max_batches``; LoRA-GA: ``scale``,
        ``direction``, ``n_batches``; LoRA-SB: ``lr`` (of the first step; needed), ``n_samples``.

    Returns
    -------
    PeftModel
        With ``model.adapt_report``, an :class:`AdaptReport`; after EVA also ``model.eva``, whose
        ``plan`` holds the ranks.

    Raises
    ------
    InputError
        On an unknown method or option, a pattern that matches nothing, a rank above what a layer
        allows, missing or unfit data, a quantised or factorised layer where the method changes
        weights. After any error the model is as it was.
    PlanError
        When the plan is of another model or purpose.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    >>> tuned = adapt(model, "lora", rank=2, targets=["0"])
    >>> tuned.adapt_report.parameters
    28
    """
    row = _method(method, options)
    if plan is not None and rank is not None:
        raise InputError("give a plan or a rank, not both")
    if row.needs in ("activations", "gradients") and data is None:
        raise InputError(f"{row.title} needs {row.needs}: pass data, batches to take them from")
    if hasattr(model, "peft_config"):
        raise InputError("the model has adapters already; give the base model")
    if plan is not None and not row.planned:
        raise PlanError(f"{row.title} has one rank for all layers: give rank instead of a plan")
    found = _targets(model, targets, task_type) if plan is None else _planned(model, plan)
    wanted = row.rank if rank is None else rank
    ranks = {name: wanted if planned is None else planned for name, planned in found.items()}
    transposed = _check_ranks(model, ranks)
    if not row.quantised:
        _check_weights(model, ranks, row)
    if plan is not None and method == "eva":
        options.setdefault("rho", 1.0)
    began = time.perf_counter()
    request = Request(
        model, ranks, alpha, dropout, task_type, () if data is None else data, loss_fn, forward_fn,
        transposed, seed, progress,
    )  # fmt: skip
    with _undone_on_errors(model):
        tuned, learnt = row.start(request, **options)
    tuned.adapt_report = AdaptReport(
        method, _layers(tuned, learnt), time.perf_counter() - began, row.optimizer
    )
    return tuned


def _method(name: str, options: Mapping[str, Any]) -> Method:
    if name not in METHODS:
        raise InputError(f"method={name!r}; it is one of {', '.join(METHODS)}")
    parameters = inspect.signature(METHODS[name].start).parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        for option in options:
            if option not in known:
                raise InputError(f"{name} has no option {option!r}; it has {', '.join(known)}")
    return METHODS[name]


def _targets(
    model: nn.Module, targets: str | Sequence[str] | None, task_type: str | None
) -> dict[str, int | None]:
    linear = {name: module for name, module in model.named_modules() if is_linear(module)}
    if targets is None:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        others = _LEFT_OUT.get(task_type or "", ())
        found = [
            name
            for name, module in linear.items()
            if module is not head and not any(part in others for part in name.split("."))
        ]
        if not found:
            raise InputError("the model has no linear layer to adapt")
        return dict.fromkeys(found)
    chosen: dict[str, int | None] = {}
    for pattern in [targets] if isinstance(targets, str) else targets:
        hits = [
            name
            for name in linear
            if fnmatchcase(canonical_name(name), pattern)
            or f".{canonical_name(name)}".endswith(f".{pattern}")
        ]
        if not hits:
            raise InputError(
                f"no linear layer is named like {pattern!r}; there are "
                f"{', '.join(list(linear)[:4])}, ..."
            )
        chosen |= dict.fromkeys(hits)
    if not chosen:
        raise InputError("targets is empty; name at least one layer")
    return {name: None for name in linear if name in chosen}


def _planned(model: nn.Module, plan: RankPlan) -> dict[str, int | None]:
    modules = {id(module): name for name, module in plan.check(model, "adapter").items()}
    found = {
        name: plan[modules[id(module)]].rank
        for name, module in model.named_modules()
        if id(module) in modules
    }
    if not found:
        raise InputError("the plan gives no layer a rank")
    return found


def _check_ranks(model: nn.Module, ranks: Mapping[str, int]) -> bool:
    """Raise on a rank that a layer does not allow; say whether the layers are ``Conv1D``."""
    transposed = False
    for name, rank in ranks.items():
        module: Any = model.get_submodule(name)
        shape = shape_of(module)
        most = min(shape)
        if not 1 <= rank <= most:
            raise InputError(
                f"{canonical_name(name)} is {' x '.join(map(str, shape))}: rank "
                f"{rank} is not in [1, {most}]; give a smaller rank, a plan, or leave the layer "
                "out of targets"
            )
        transposed |= is_conv1d(module)
    return transposed


def _check_weights(model: nn.Module, names: Iterable[str], method: Method) -> None:
    """Raise where a method would change a weight that is no matrix of floating-point numbers."""
    for name in names:
        module: Any = model.get_submodule(name)
        if is_factorised(module):
            raise InputError(
                f"{canonical_name(name)} is factorised, and {method.title} changes or decomposes "
                "weights: put it on the dense model, leave the layer out of targets, or take lora "
                "or eva"
            )
        weight = module.weight
        if not weight.is_floating_point() or type(weight).__name__ in _QUANTISED:
            raise InputError(
                f"{canonical_name(name)} is quantised ({weight.dtype}), and {method.title} changes "
                "or decomposes weights: load the model without quantisation, or take lora or eva"
            )


@contextmanager
def _undone_on_errors(model: nn.Module) -> Iterator[None]:
    """Bring everything of the model back when something goes wrong.

    Modules, parameters, hooks, modes and attributes are put back as they were held before, and so
    are the tensors that weights had: PiSSA gives layers new ones, one after another.
    """
    modules = [(module, _held(module)) for module in model.modules()]
    weights = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        yield
    except BaseException:
        for module, held in modules:
            module.__dict__.clear()
            module.__dict__.update(held)
        for parameter, data, wanted, gradient in weights:
            if parameter.data.data_ptr() != data.data_ptr():
                parameter.data = data
            parameter.requires_grad_(wanted)
            parameter.grad = gradient
        raise


def _held(module: nn.Module) -> dict[str, Any]:
    return {k: copy.copy(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}


def _layers(model: Any, found: Found) -> tuple[LayerReport, ...]:
    from_peft = require("peft.tuners.tuners_utils", extra="adapters").BaseTunerLayer
    reports = []
    for name, layer in model.named_modules():
        if isinstance(layer, from_peft):
            plain = canonical_name(name)
            trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
            reports.append(
                LayerReport(
                    plain,
                    int(layer.r["default"]),
                    found.explained.get(plain),
                    found.captured.get(plain),
                    trained,
                    found.seconds.get(plain),
                )
            )
    return tuple(reports)
