"""From named parameters and a plan to param groups."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from fullrank.core.errors import InputError, PlanError
from fullrank.core.names import canonical_name
from fullrank.core.plan import RankPlan


def planned_groups(params: Iterable[Any], plan: RankPlan, rank: Any = None) -> list[dict[str, Any]]:
    """Give every named parameter the rank that a plan has for its layer; the others None.

    Parameters
    ----------
    params
        ``model.named_parameters()``.
    plan
        A plan of purpose ``"optimizer"``.
    rank
        Must be None: a plan takes its place.

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
    >>> from fullrank.core.plan import PlanEntry
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
    ranks = dict.fromkeys(range(len(named)))
    layers = {canonical_name(name).removesuffix(".weight"): i for i, (name, _) in enumerate(named)}
    for name, entry in plan.items():
        if name not in layers:
            raise PlanError(f"no parameter belongs to {name!r}, which the plan names")
        weight: Tensor = named[layers[name]][1]
        if math.prod(weight.shape) != entry.dense_size:
            raise PlanError(
                f"{name}: the plan is for {entry.shape}, the model has {tuple(weight.shape)}"
            )
        ranks[layers[name]] = entry.rank
    return [{"params": named, "rank": list(ranks.values())}]
