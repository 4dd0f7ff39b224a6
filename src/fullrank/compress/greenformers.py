"""Greenformers: two thin layers for each dense one, by design or after training.

Cahyawijaya, "Greenformers: Improving Computation and Memory Efficiency in Transformer Models via
Low-Rank Approximation", 2021, arXiv 2108.10808, and its toolkit, arXiv 2109.06762. A linear layer
becomes ``y = B (A x) + b``, a convolution one to r channels with the old kernel and a 1x1
convolution. One number gives every layer its rank, as a share of its break-even rank. Factors
drawn anew are trained from scratch (the low-rank transformer); those of a trained weight, by SVD or
semi-NMF, replace it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Literal, NamedTuple, get_args

from torch import nn

from fullrank.compress.factorization import factorize
from fullrank.compress.matrices import matricise
from fullrank.compress.matrices_conv import CONVOLUTIONS
from fullrank.compress.planning import entry_for
from fullrank.compress.targets import Patterns, factorisable
from fullrank.core.errors import InputError
from fullrank.core.names import model_fingerprint
from fullrank.core.plan import RankPlan

Solver = Literal["svd", "snmf", "random"]
Rank = float | int


def greenformers(
    model: nn.Module,
    rank: Rank | Mapping[str, Rank] = 0.5,
    method: Solver = "svd",
    include: Patterns | None = None,
    exclude: Patterns = (),
    inplace: bool = False,
    *,
    official_conv_rank: bool = False,
) -> nn.Module:
    """Factorise a model's linear and convolutional layers (the toolkit's ``auto_fact``).

    Parameters
    ----------
    model
        Trained, or to be trained from scratch (``method="random"``).
    rank
        A float in (0, 1): ``floor(f * floor(m n / (m + n)))``, a share of each layer's break-even
        rank; typically 0.25 to 0.75. An integer: that rank for all. A mapping from name patterns
        to either: the first that matches, and layers that none matches stay dense.
    method
        ``"svd"``: the best factors of the weight, the sizes in the first. ``"snmf"``: semi-NMF,
        the second factor without negative numbers. ``"random"``: new factors whose product has
        the variance of a new dense layer (that of two layers drawn by default, as in the official
        code, has a third of it); of the old layer only the bias is kept.
    include, exclude
        Shell patterns over canonical names. By default every linear layer, ``Conv1D`` and
        convolution but a language model's output head. Left alone are quantised layers,
        ``nn.MultiheadAttention``, and subclasses with a ``forward`` of their own, of which a
        warning tells (see :func:`~fullrank.compress.factorisable`).
    inplace
        Change ``model`` itself; a copy by default.
    official_conv_rank
        Ranks of convolutions as in the official code, which forgets the kernel's size in the
        break-even rank.

    Returns
    -------
    Module
        All of it is trained as before. It saves and loads as every shrunk model;
        :func:`~fullrank.compress.report` lists what was done.

    Raises
    ------
    InputError
        (A ``ValueError``.) On a rank that is no integer of at least 1 and no float between 0 and
        1, an unknown method, a pattern that matches nothing, or a weight that is not finite.

    Warns
    -----
    UserWarning
        When the rank saves nothing in some layers, which then stay dense.

    Examples
    --------
    >>> model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10))
    >>> greenformers(model, rank=0.5, exclude="2")
    Sequential(
      (0): LowRankLinear(in_features=64, out_features=96, rank=19, bias=True)
      (1): ReLU()
      (2): Linear(in_features=96, out_features=10, bias=True)
    )
    """
    plan = greenformers_plan(
        model, rank, method, include, exclude, official_conv_rank=official_conv_rank
    )
    whole = [name for name, entry in plan.items() if _SAVES_NOTHING in entry.reason]
    if whole:
        warnings.warn(
            f"{len(whole)} layers stay dense, e.g. {whole[0]}: {plan[whole[0]].reason}",
            stacklevel=2,
        )
    target = model if inplace else copy.deepcopy(model)
    return factorize(target, plan, balance="first" if method == "svd" else None)


def greenformers_plan(
    model: nn.Module,
    rank: Rank | Mapping[str, Rank] = 0.5,
    method: Solver = "svd",
    include: Patterns | None = None,
    exclude: Patterns = (),
    *,
    official_conv_rank: bool = False,
) -> RankPlan:
    """Give each layer the rank that the method's rule says; nothing in the model changes.

    Parameters, errors and what is left dense as in :func:`greenformers`.

    Examples
    --------
    >>> plan = greenformers_plan(nn.Sequential(nn.Conv2d(64, 64, 3)), rank=0.5)
    >>> plan["0"].rank, plan["0"].scheme
    (28, 'channel')
    """
    if method not in get_args(Solver):
        raise InputError(f"method {method!r}; it is one of {', '.join(get_args(Solver))}")
    given = dict(rank) if isinstance(rank, Mapping) else {"*": rank}
    for value in given.values():
        _check(value)
    entries, unused = {}, set(given)
    for name, module in factorisable(model, include, exclude).items():
        found = matricise(module)
        pattern = next((p for p in given if fnmatchcase(name, p)), None)
        unused.discard(pattern or "")
        chosen, reason = None, "no pattern of ranks matches"
        if pattern is not None:
            limit, step = _limit(module, official_conv_rank)
            chosen, reason = _rank_within(given[pattern], limit, step)
        entries[name] = entry_for(
            found.shape, chosen, method, reason, found.scheme, stack=found.stack
        )
    if unused:
        raise InputError(f"no layer is named like {sorted(unused)[0]!r}")
    return RankPlan(entries, fingerprint=model_fingerprint(model))


_SAVES_NOTHING = "saves nothing"


class _Limit(NamedTuple):
    """The rank from which on nothing is saved, and how many ranks the layer has (its groups)."""

    rank: int
    groups: int


def _limit(module: nn.Module, official_conv_rank: bool) -> _Limit:
    found = matricise(module)
    m, n = found.shape
    if isinstance(module, CONVOLUTIONS) and official_conv_rank:
        # All channels in, those of one group out, no kernel; counted for all groups together.
        n = module.in_channels
        return _Limit(m * n // (m + n), module.groups)
    return _Limit(found.stack * (m * n // (m + n)), found.stack)


def _rank_within(rank: Rank, limit: int, groups: int) -> tuple[int | None, str]:
    """Rank of each group, or None, and the reason."""
    whole = int(rank if isinstance(rank, Integral) else limit * rank)
    # Each group has as many of the channels between the two convolutions.
    each = -(-whole // groups)
    reason = f"rank {rank:g}" if isinstance(rank, Integral) else f"{rank:g} of rank {limit}"
    if each * groups >= limit and whole:
        return None, f"{reason}: {each * groups} {_SAVES_NOTHING}"
    return each or None, reason


def _check(rank: Rank) -> None:
    # NumPy's numbers are welcome; a bool is none.
    whole = isinstance(rank, Integral) and not isinstance(rank, bool) and rank >= 1
    share = isinstance(rank, Real) and not isinstance(rank, Integral) and 0 < rank < 1
    if not (whole or share):
        raise InputError(
            f"rank {rank!r}; a float between 0 and 1 (a share of the break-even rank) or an "
            "integer of at least 1 is expected"
        )
