"""Param groups for a model: which weights are projected, and to which rank."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from fullrank.core.errors import InputError
from fullrank.core.names import canonical_name
from fullrank.core.plan import RankPlan
from fullrank.core.table import Table
from fullrank.optim.base import SubspaceOptimizer
from fullrank.optim.galore import GaLoreAdamW
from fullrank.optim.matrices import matrix_shape
from fullrank.optim.memory import memory_table

Patterns = str | Sequence[str]


class ParamGroups(list[dict[str, Any]]):
    """A list of param groups that knows, and prints, what is in them.

    Attributes
    ----------
    optimizer
        The class the groups are for.
    projected
        Module name -> (shape of the weight, rank).
    others
        Names of the parameters that are not projected.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        optimizer: type[SubspaceOptimizer],
        projected: dict[str, tuple[tuple[int, ...], int]],
        others: dict[str, tuple[int, ...]],
    ) -> None:
        super().__init__(groups)
        self.optimizer = optimizer
        self.projected = projected
        self.others = others

    def memory(self, **options: Any) -> Table:
        """Memory of training with these groups; see :func:`memory_table`."""
        return memory_table(self, self.optimizer, **options)

    def __str__(self) -> str:
        lines = [f"{len(self.projected)} weights are projected, {len(self.others)} are not"]
        lines += _summary((name, f"{s}, rank {r}") for name, (s, r) in self.projected.items())
        lines.append("not projected:")
        lines += _summary((name, str(shape)) for name, shape in self.others.items())
        return "\n".join([*lines, "", self.memory().markdown()])


def param_groups(
    model: nn.Module,
    optimizer: type[SubspaceOptimizer] = GaLoreAdamW,
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
    if not (isinstance(optimizer, type) and issubclass(optimizer, SubspaceOptimizer)):
        raise InputError(f"optimizer={optimizer!r} is not a class of fullrank.optim's")
    unknown = sorted(set(options) - set(optimizer.checks))
    if unknown:
        raise InputError(
            f"groups of {optimizer.__name__} have no {unknown[0]!r}; "
            f"they have {', '.join(sorted(optimizer.checks))}"
        )
    if plan is not None:
        if targets is not None or exclude:
            raise InputError("a plan says which weights it is for; leave targets and exclude out")
        chosen = _from_plan(model, plan)
    else:
        assert rank is not None
        optimizer.checks["rank"]("rank", rank)
        chosen = _from_patterns(model, rank, _patterns(targets), _patterns(exclude))
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


def _assemble(
    model: nn.Module,
    optimizer: type[SubspaceOptimizer],
    chosen: dict[str, tuple[Tensor, int]],
    options: dict[str, Any],
    one_rank: int | None,
) -> ParamGroups:
    ids = {id(weight) for weight, _ in chosen.values()}
    named = [(canonical_name(n), p) for n, p in model.named_parameters() if p.requires_grad]
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
        groups.append({"params": list(others.values())})
    return ParamGroups(
        groups,
        optimizer,
        {name: (tuple(weight.shape), rank) for name, (weight, rank) in chosen.items()},
        {name: tuple(param.shape) for name, param in others.items()},
    )


# -- which weights ---------------------------------------------------------------------------


def _layer_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Weights that are matrices of a linear map, by canonical name of their layer."""
    for name, module in model.named_modules():
        path = canonical_name(name)
        if isinstance(module, nn.MultiheadAttention):
            for part in ("in_proj", "q_proj", "k_proj", "v_proj"):
                weight = getattr(module, f"{part}_weight", None)
                if weight is not None:
                    yield f"{path}.{part}".lstrip("."), weight
        elif (
            isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            or type(module).__name__ == "Conv1D"
        ):
            yield path, module.weight


def _available(model: nn.Module, skip_head: bool) -> dict[str, Tensor]:
    taken = {
        id(param)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
        for param in module.parameters(recurse=False)
    }
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if skip_head and callable(getter) else None
    if head is not None:
        taken.update(id(param) for param in head.parameters())
    found: dict[str, Tensor] = {}
    for name, weight in _layer_weights(model):
        if weight.requires_grad and id(weight) not in taken:
            taken.add(id(weight))
            found[name] = weight
    return found


def _from_patterns(
    model: nn.Module, rank: int, targets: list[str], exclude: list[str]
) -> dict[str, tuple[Tensor, int]]:
    available = _available(model, skip_head=not targets)
    for pattern in exclude:
        if not any(_matches(n, pattern) for n in available):
            raise InputError(f"exclude: no layer is named like {pattern!r}; {_some(available)}")
    chosen = {
        name: (weight, rank)
        for name, weight in available.items()
        if (not targets or any(_matches(name, p) for p in targets))
        and not any(_matches(name, p) for p in exclude)
        and rank < min(matrix_shape(weight.shape))
    }
    if not chosen:
        raise InputError(
            f"nothing to project: no layer wider than rank {rank} is named like "
            f"{targets or 'anything'}; {_some(available)}"
        )
    return chosen


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


def _matches(name: str, pattern: str) -> bool:
    wild = any(character in pattern for character in "*?[")
    return fnmatchcase(name, pattern) if wild else pattern in name


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
