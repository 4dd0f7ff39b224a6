"""What training costs in memory: weights, gradients and optimizer state, before it starts."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fullrank.core.errors import InputError
from fullrank.core.table import Table
from fullrank.optim.foundation import FullrankOptimizer
from fullrank.optim.mkor import MKOR
from fullrank.optim.sharded import local


def human_bytes(count: int) -> str:
    """A number of bytes for people.

    >>> human_bytes(900), human_bytes(3 * 2**20)
    ('900 B', '3.00 MiB')
    """
    if count < 1024:
        return f"{count} B"
    exponent = min(int(math.log2(count) // 10), 4)
    return f"{count / 1024**exponent:,.2f} {'KMGT'[exponent - 1]}iB"


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that an optimizer holds now in this process; MKOR's factors count.

    Counts what is kept alive: a slice that holds on to a larger tensor costs the whole of it.
    """
    # accelerate's, for one, wraps another.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    storages = {}
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                storage = local(value).untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    beside = getattr(optimizer, "factor_bytes", None)
    return sum(storages.values()) + (0 if beside is None else beside())


def memory_table(
    optimizer: Optimizer | Iterable[dict[str, Any]],
    kind: type[FullrankOptimizer] | None = None,
    **options: Any,
) -> Table:
    """Weights, gradients and optimizer state in bytes, beside ``torch.optim.AdamW``'s state.

    Nothing is allocated: the sizes follow from the shapes.

    Parameters
    ----------
    optimizer
        An optimizer (torch's, too), or the param groups it would get.
    kind, options
        With groups: the optimizer's class, and its other arguments.

    Returns
    -------
    Table
        One row for projected matrices, one for the other parameters, one for MKOR's factors once
        they have had many updates, one for all: tensors, parameters, bytes of weights, gradients
        and state, bytes of AdamW's state (two moments of the weight's dtype and a step), and the
        ratio of the two. Numbers are bytes; the table shows them with units.

    Raises
    ------
    InputError
        On groups without a ``kind``; on an optimizer that cannot take a step without a closure.

    Examples
    --------
    >>> import torch
    >>> from fullrank.optim import GaLoreAdamW
    >>> table = memory_table([{"params": [torch.zeros(64, 32)], "rank": 4}], GaLoreAdamW)
    >>> dict(zip(table.columns, table.rows[-1], strict=True))["optimizer state"]
    2568
    """
    if not isinstance(optimizer, Optimizer):
        if kind is None:
            raise InputError("param groups alone do not say how they are stepped; give kind=...")
        optimizer = kind(optimizer, **options)
    sums = {"projected": [0] * 6, "not projected": [0] * 6, "factors": [0] * 6, "all": [0] * 6}
    factors = 0
    if isinstance(optimizer, MKOR):
        factors = sum(layer.most_bytes for layer in optimizer.layers)
        optimizer = optimizer.inner
    ours = optimizer if isinstance(optimizer, FullrankOptimizer) else None
    kept = _state_sizes(optimizer)
    for group in optimizer.param_groups:
        for param in group["params"]:
            weight = param.numel() * param.element_size()
            gradient = weight if param.requires_grad else 0
            row = (1, param.numel(), weight, gradient, kept[param], 2 * weight + 4)
            projected = ours is not None and ours.projects(param)
            for part in ("projected" if projected else "not projected", "all"):
                sums[part] = [a + b for a, b in zip(sums[part], row, strict=True)]
    for part in ("factors", "all"):
        sums[part][4] += factors
    columns = ["weights", "gradients", "optimizer state", "AdamW's state"]
    rows = [
        [part, *row, row[4] / row[5] if row[5] else None] for part, row in sums.items() if any(row)
    ]
    return Table(
        ["part", "tensors", "parameters", *columns, "state / AdamW's"],
        rows,
        formats={
            **dict.fromkeys(columns, human_bytes),
            "parameters": ",d",
            "state / AdamW's": ".1%",
        },
    )


def _state_sizes(optimizer: Optimizer) -> dict[Tensor, int]:
    """Bytes of each parameter's state."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if isinstance(optimizer, FullrankOptimizer):
        specs = (optimizer.expected_state(param).values() for param in params)
        sizes = [sum(math.prod(shape) * dtype.itemsize for shape, dtype in spec) for spec in specs]
    else:
        # What an optimizer of others keeps, its first step says.
        twins = [torch.empty_like(param, device="meta") for param in params]
        states = _first_step(optimizer, twins)
        tensors = ((v for v in states[t].values() if isinstance(v, Tensor)) for t in twins)
        sizes = [sum(v.numel() * v.element_size() for v in each) for each in tensors]
    return dict(zip(params, sizes, strict=True))


def _first_step(optimizer: Optimizer, params: list[Tensor]) -> dict[Tensor, dict[str, Any]]:
    """State of a copy of an optimizer after a step with tensors that take no memory."""
    twin, left = copy.copy(optimizer), iter(params)
    twin.state = defaultdict(dict)
    plain = dict.fromkeys(("fused", "foreach", "capturable"), False)
    twin.param_groups = [
        {
            **group,
            **{name: value for name, value in plain.items() if name in group},
            "params": [next(left) for _ in group["params"]],
        }
        for group in optimizer.param_groups
    ]
    for param in params:
        param.grad = torch.empty_like(param)
    try:
        twin.step()
    except Exception as error:
        name = type(optimizer).__name__
        raise InputError(f"{name} does not say what state it keeps: {error}") from error
    return twin.state
