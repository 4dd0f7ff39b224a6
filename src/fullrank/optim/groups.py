"""Param groups for a model: which weights are projected, and to which rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fullrank.core.errors import InputError
from fullrank.core.names import canonical_modules, canonical_parameters, is_linear_like
from fullrank.core.plan import RankPlan
from fullrank.core.table import Table
from fullrank.optim.foundation import FullrankOptimizer
from fullrank.optim.frugal import FrugalAdamW
from fullrank.optim.galore import GaLoreAdamW
from fullrank.optim.matrices import matrix_shape
from fullrank.optim.memory import memory_table
from fullrank.optim.patterns import matches
from fullrank.optim.planned import planned_options

Patterns = str | Sequence[str]


class ParamGroups(list[dict[str, Any]]):
    """A list of param groups that knows, and prints, what is in them.

    Attributes
    ----------
    optimizer
        The class the groups are for.
    projected
        Module name -> (shape of the weight, rank; None where a part of it has state).
    others
        Names of the parameters that are not projected.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        optimizer: type[FullrankOptimizer],
        projected: Mapping[str, tuple[tuple[int, ...], int | None]],
        others: Mapping[str, tuple[int, ...]],
    ) -> None:
        super().__init__(groups)
        self.optimizer = optimizer
        self.projected = dict(projected)
        self.others = dict(others)

    def memory(self, **options: Any) -> Table:
        """Memory of training with these groups; see :func:`memory_table`."""
        return memory_table(self, self.optimizer, **options)

    def __str__(self) -> str:
        lines = [f"{len(self.projected)} weights are projected, {len(self.others)} are not"]
        lines += _summary(
            (name, f"{s}, rank {r}" if r else f"{s}") for name, (s, r) in self.projected.items()
        )
        lines.append("not projected:")
        lines += _summary((name, str(shape)) for name, shape in self.others.items())
        return "\n".join([*lines, "", self.memory().markdown()])


def param_groups(
    model: nn.Module,
    optimizer: type[FullrankOptimizer] = GaLoreAdamW,
    rank: int | None = None,
    plan: RankPlan | None = None,
    targets: Patterns | None = None,
    exclude: Patterns = (),
    *,
    verbose: bool = True,
    **options: Any,
) -> ParamGroups:
    """Sort a model's trainable parameters into a projected group and an ordinary one.

    Parameters
    ----------
    model
        Any module; the weights of its Linear layers (transformers' ``Conv1D`` too), convolutions
        and ``nn.MultiheadAttention`` can be projected. A weight that an embedding holds too (a
        tied head) never is, one that two layers share is so once.
    optimizer
        The class the groups are for.
    rank
        One rank for all; either this or ``plan``. Weights no wider than the rank stay whole.
    plan
        A plan of purpose ``"optimizer"``: a rank for each weight, all in one group.
    targets
        Which layers, by canonical name: shell patterns (``"*.attn.*"``), or, without a wildcard,
        parts of names (``"attn"``). By default every layer but the output head.
    exclude
        Which of these not to project.
    verbose
        Print what matched, what did not, and the memory table.
    **options
        Other keys of the projected group, e.g. ``update_proj_gap=500``, ``scale=1.0``.

    Returns
    -------
    ParamGroups
        A list of one or two dicts, ready for the optimizer.

    Raises
    ------
    InputError
        Without rank or plan, or with both; when a pattern or all of them match nothing; on an
        option that the optimizer's groups do not have.
    PlanError
        When the plan is another model's, or for another purpose.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    >>> groups = param_groups(model, rank=8, verbose=False)
    >>> groups.projected
    {'0': ((64, 32), 8), '2': ((32, 64), 8)}
    >>> optimizer = GaLoreAdamW(groups, lr=0.01)
    """
    if (rank is None) == (plan is None):
        raise InputError("give either rank= (one for all) or plan= (one for each weight)")
    ours = isinstance(optimizer, type) and issubclass(optimizer, FullrankOptimizer)
    if not ours or "rank" not in optimizer.checks:
        raise InputError(f"optimizer={optimizer!r} is not a class of fullrank.optim's with ranks")
    _known(optimizer, options)
    if plan is not None:
        if targets is not None or exclude:
            raise InputError("a plan says which weights it is for; leave targets and exclude out")
        chosen = _from_plan(model, plan)
        options = {**planned_options([plan[name] for name in chosen], optimizer.planned), **options}
    else:
        assert rank is not None
        optimizer.checks["rank"]("rank", rank)
        chosen = _from_patterns(model, rank, targets, exclude)
    groups = _assemble(model, optimizer, chosen, options, one_rank=rank)
    if verbose:
        print(groups)
    return groups


def galore_param_groups(
    model: nn.Module, rank: int, targets: Patterns = ("attn", "mlp"), **options: Any
) -> ParamGroups:
    """Return the official pre-training script's groups: layers named after attention or MLP.

    See :func:`param_groups`, which this calls and which finds every layer by default.

    >>> block = nn.ModuleDict({"mlp": nn.Linear(8, 16), "head": nn.Linear(16, 8)})
    >>> list(galore_param_groups(block, rank=2, targets="mlp").projected)
    ['mlp']
    """
    options.setdefault("verbose", False)
    return param_groups(model, GaLoreAdamW, rank, targets=targets, **options)


def frugal_param_groups(
    model: nn.Module,
    targets: Patterns | None = None,
    exclude: Patterns = (),
    *,
    project_embeddings: bool = False,
    project_head: bool = False,
    project_norms: bool = False,
    verbose: bool = False,
    **options: Any,
) -> ParamGroups:
    """Sort a model's parameters into those FRUGAL divides and those that keep all their state.

    Parameters
    ----------
    model, targets, exclude, verbose
        As for :func:`param_groups`.
    project_embeddings, project_head, project_norms
        Divide these too. By default they keep Adam's whole state: the paper finds that the head
        needs it.
    **options
        Other keys of the divided group, e.g. ``subspace="columns"``, ``density=0.1``.

    Returns
    -------
    ParamGroups
        The divided group, in the model's order, and the other one.

    Raises
    ------
    InputError
        When a pattern or all of them match nothing; on an option that FRUGAL's groups do not have.

    Examples
    --------
    >>> model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(16, 8))
    >>> list(frugal_param_groups(model, density=0.5).projected)
    ['1.weight', '2.weight']
    """
    _known(FrugalAdamW, options)
    available = _available(model, skip_head=not (targets or project_head))
    picked = _picked(available, _patterns(targets), _patterns(exclude))
    chosen = {id(weight) for weight in picked.values()}
    for module in model.modules():
        embeds = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        norms = "norm" in type(module).__name__.lower()
        if (project_embeddings and embeds) or (project_norms and norms):
            chosen.update(id(p) for p in module.parameters(recurse=False))
    named = [(n, p) for n, p in canonical_parameters(model) if p.requires_grad]
    divided = {name: param for name, param in named if id(param) in chosen}
    others = {name: param for name, param in named if id(param) not in chosen}
    if not divided:
        raise InputError(
            f"nothing to divide: no layer is named like {targets or 'anything'}; {_some(available)}"
        )
    groups: list[dict[str, Any]] = [
        {"params": list(divided.values()), "is_proj_params": True, **options}
    ]
    if others:
        groups.append({"params": list(others.values()), "is_proj_params": False})
    found = ParamGroups(
        groups,
        FrugalAdamW,
        {name: (tuple(param.shape), None) for name, param in divided.items()},
        {name: tuple(param.shape) for name, param in others.items()},
    )
    if verbose:
        print(found)
    return found


def _known(optimizer: type[FullrankOptimizer], options: Mapping[str, Any]) -> None:
    unknown = sorted(set(options) - set(optimizer.checks))
    if unknown:
        raise InputError(
            f"groups of {optimizer.__name__} have no {unknown[0]!r}; "
            f"they have {', '.join(sorted(optimizer.checks))}"
        )


def _assemble(
    model: nn.Module,
    optimizer: type[FullrankOptimizer],
    chosen: dict[str, tuple[Tensor, int]],
    options: dict[str, Any],
    one_rank: int | None,
) -> ParamGroups:
    ids = {id(weight) for weight, _ in chosen.values()}
    named = [(n, p) for n, p in canonical_parameters(model) if p.requires_grad]
    others = {name: param for name, param in named if id(param) not in ids}
    ranks = [rank for _, rank in chosen.values()]
    groups: list[dict[str, Any]] = [
        {
            "params": [weight for weight, _ in chosen.values()],
            "rank": ranks if one_rank is None else one_rank,
            **options,
        }
    ]
    if others:
        groups.append({"params": list(others.values()), "rank": None})
    return ParamGroups(
        groups,
        optimizer,
        {name: (tuple(weight.shape), rank) for name, (weight, rank) in chosen.items()},
        {name: tuple(param.shape) for name, param in others.items()},
    )


# -- which weights ---------------------------------------------------------------------------


def _layer_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights that are matrices of a linear map, by canonical name of their layer."""
    for path, module in canonical_modules(model):
        if isinstance(module, nn.MultiheadAttention):
            for part in ("in_proj", "q_proj", "k_proj", "v_proj"):
                weight = getattr(module, f"{part}_weight", None)
                if weight is not None:
                    yield f"{path}.{part}".lstrip("."), weight
        elif isinstance(module, nn.modules.conv._ConvNd) or is_linear_like(module):
            assert isinstance(module.weight, Tensor)
            yield path, module.weight


def _available(model: nn.Module, skip_head: bool) -> dict[str, Tensor]:
    taken = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for param in module.parameters(recurse=False)
    }
    head = _head(model) if skip_head else None
    if head is not None:
        taken.update(id(param) for param in head.parameters())
    found: dict[str, Tensor] = {}
    for name, weight in _layer_weights(model):
        # What a parametrization computes is no leaf, and cannot be stepped.
        if weight.is_leaf and weight.requires_grad and id(weight) not in taken:
            taken.add(id(weight))
            found[name] = weight
    return found


def _head(model: nn.Module) -> nn.Module | None:
    """The output head, as Hugging Face's models tell it; also of a model that something wraps."""
    for module in model.modules():
        getter: Any = getattr(module, "get_output_embeddings", None)
        if callable(getter):
            found = getter()
            return found if isinstance(found, nn.Module) else None
    return None


def projectable(
    model: nn.Module, targets: Patterns | None = None, exclude: Patterns = ()
) -> dict[str, Tensor]:
    """Weights that can be projected, by canonical name of their layer; see :func:`param_groups`."""
    available = _available(model, skip_head=not targets)
    return _picked(available, _patterns(targets), _patterns(exclude))


def _from_patterns(
    model: nn.Module, rank: int, targets: Patterns | None, exclude: Patterns
) -> dict[str, tuple[Tensor, int]]:
    chosen = {
        name: (weight, rank)
        for name, weight in projectable(model, targets, exclude).items()
        if rank < min(matrix_shape(weight.shape))
    }
    if not chosen:
        raise InputError(
            f"nothing to project: no layer wider than rank {rank} is named like "
            f"{targets or 'anything'}; {_some(_available(model, skip_head=not targets))}"
        )
    return chosen


def _picked(
    available: dict[str, Tensor], targets: list[str], exclude: list[str]
) -> dict[str, Tensor]:
    """Those that a target names, or all, without those that are excluded."""
    for pattern in exclude:
        if not any(matches(n, pattern) for n in available):
            raise InputError(f"exclude: no layer is named like {pattern!r}; {_some(available)}")
    return {
        name: weight
        for name, weight in available.items()
        if (not targets or any(matches(name, p) for p in targets))
        and not any(matches(name, p) for p in exclude)
    }


def _from_plan(model: nn.Module, plan: RankPlan) -> dict[str, tuple[Tensor, int]]:
    modules = plan.check(model, "optimizer")
    chosen: dict[str, tuple[Tensor, int]] = {}
    seen: set[int] = set()
    for name, module in modules.items():
        rank, weight = plan[name].rank, module.weight
        assert rank is not None
        assert isinstance(weight, Tensor)
        if weight.requires_grad and id(weight) not in seen:
            seen.add(id(weight))
            chosen[name] = (weight, rank)
    if not chosen:
        raise InputError("the plan gives no trainable weight a rank; nothing would be projected")
    return chosen


def _patterns(value: Patterns | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _some(available: dict[str, Tensor]) -> str:
    names = ", ".join(list(available)[:4])
    return f"there are {names}{', ...' if len(available) > 4 else ''}" if names else "there is none"


def _summary(entries: Iterator[tuple[str, str]]) -> list[str]:
    """One line for all layers that differ in their number alone."""
    counts: dict[tuple[str, str], int] = {}
    for name, text in entries:
        key = re.sub(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", "*", name), text
        counts[key] = counts.get(key, 0) + 1
    width = max((len(name) for name, _ in counts), default=0)
    return [f"  {name:<{width}}  {n:>4} x {text}" for (name, text), n in counts.items()]
