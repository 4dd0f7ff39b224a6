"""From named parameters and a plan to param groups."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fullrank.core.errors import InputError, PlanError
from fullrank.core.names import canonical_name
from fullrank.core.plan import PlanEntry, RankPlan


def planned_options(
    entries: Iterable[PlanEntry | None], names: Iterable[str]
) -> dict[str, list[Any]]:
    """Return the options of these names that entries give, one value (or None) an entry.

    >>> planned_options([PlanEntry((8, 6), 2, options={"lra_rank": 3}), None], ["lra_rank"])
    {'lra_rank': [3, None]}
    """
    given = [{} if entry is None else entry.options for entry in entries]
    return {
        name: [each.get(name) for each in given]
        for name in names
        if any(name in each for each in given)
    }


def planned_groups(
    params: Iterable[Any], plan: RankPlan, rank: Any = None, options: Iterable[str] = ()
) -> list[dict[str, Any]]:
    """Give every named parameter the rank that a plan has for its layer; the others None.

    Parameters
    ----------
    params
        ``model.named_parameters()``.
    plan
        A plan of purpose ``"optimizer"``.
    rank
        Must be None: a plan takes its place.
    options
        Which options of the plan's entries the group lists, too.

    Returns
    -------
    list
        One group, with one rank (or None) a parameter.

    Raises
    ------
    InputError
        Without names, or with a rank beside the plan.
    PlanError
        When the plan is for another purpose, or names a layer that is not there or of another
        size.

    Examples
    --------
    >>> from torch import nn
    >>> plan = RankPlan({"0": PlanEntry((8, 6), 2)}, purpose="optimizer")
    >>> planned_groups(nn.Sequential(nn.Linear(6, 8)).named_parameters(), plan)[0]["rank"]
    [2, None]
    """
    if rank is not None:
        raise InputError("give either rank= (one for all) or plan= (one for each weight)")
    if plan.purpose != "optimizer":
        raise PlanError(f"this plan's ranks are for {plan.purpose!r}; make one for 'optimizer'")
    named = list(params)
    if not all(isinstance(each, tuple) and len(each) == 2 for each in named):
        raise InputError("a plan goes by names: give model.named_parameters(), or param_groups")
    entries: list[PlanEntry | None] = [None] * len(named)
    layers = {canonical_name(name).removesuffix(".weight"): i for i, (name, _) in enumerate(named)}
    for name, entry in plan.items():
        if name not in layers:
            raise PlanError(f"no parameter belongs to {name!r}, which the plan names")
        weight: Tensor = named[layers[name]][1]
        if math.prod(weight.shape) != entry.dense_size:
            raise PlanError(
                f"{name}: the plan is for {entry.shape}, the model has {tuple(weight.shape)}"
            )
        entries[layers[name]] = entry
    ranks = [None if entry is None else entry.rank for entry in entries]
    return [{"params": named, "rank": ranks, **planned_options(entries, options)}]
