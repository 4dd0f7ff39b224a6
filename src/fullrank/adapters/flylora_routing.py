"""FlyLoRA's arithmetic: a frozen sparse projection that is down-projection and router in one.

Every column of ``B`` is an expert; a token takes the ``k`` whose rows of ``A`` answer it most
(arXiv 2510.08396)::

    y = A x,    I = top-k of |y + d|,    f(x) = alpha / r * sum over I of B[:, i] y_i

``d`` only steers the choice. It follows the mean of the counts, as the official PEFT fork has it:
the official ``flylora.py`` compares counts with the fraction ``k / r``, so that nearly every
``d`` falls. The score is that of ``flylora.py``; the fork's is signed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fullrank.adapters.low_rank_add import add_low_rank
from fullrank.core.errors import InputError

Score = Literal["abs", "signed"]
Groups = Sequence[tuple[int, int]]


def sparse_projection(r: int, n: int, density: float, seed: int = 0) -> Tensor:
    """Draw ``A (r, n)``: the same number of non-zeros in each row, normal with deviation ``1/r``.

    Parameters
    ----------
    r, n
        Experts and inputs.
    density
        Share of non-zeros, rho: ``max(1, floor(density * n))`` a row. The paper's is ``k / r``.
    seed
        Of a generator of its own, on the CPU: the same matrix on any device.

    Raises
    ------
    InputError
        When a size is not positive or the density is not within (0, 1].

    Examples
    --------
    >>> A = sparse_projection(4, 10, 0.25)
    >>> (A != 0).sum(1)
    tensor([2, 2, 2, 2])
    """
    if r < 1 or n < 1:
        raise InputError(f"a projection of {r} x {n}; both sizes are at least 1")
    if not 0 < density <= 1:
        raise InputError(f"density={density}; it is above 0 and at most 1")
    # 0.29 of 100 is 29, though the product of both floats is below it.
    per_row = max(1, math.floor(density * n + 1e-9))
    # Also where layers are made without memory: what is drawn here is not drawn again.
    generator = torch.Generator().manual_seed(seed)
    where = torch.rand(r, n, generator=generator, device="cpu").topk(per_row, dim=1).indices
    values = torch.randn(r, per_row, generator=generator, device="cpu") / r
    return torch.zeros(r, n, device="cpu").scatter_(1, where, values)


def route(y: Tensor, d: Tensor, k: int, score: Score = "abs") -> Tensor:
    """Return which experts each token takes.

    Parameters
    ----------
    y
        ``A x``, of shape ``(..., r)``.
    d
        Bias of the choice, ``(r,)``.
    k
        Experts a token.
    score
        ``"abs"``: the largest ``|y + d|``; ``"signed"``: the largest ``y + d``.

    Returns
    -------
    Tensor
        Boolean, of the shape of ``y``, with ``k`` true a token. No gradient flows through it.

    Raises
    ------
    InputError
        When ``k`` is not within 1 to r, or ``score`` is neither of both.

    Examples
    --------
    >>> route(torch.tensor([3.0, -4.0, 1.0]), torch.zeros(3), 1)
    tensor([False,  True, False])
    """
    r = y.shape[-1]
    if not 1 <= k <= r:
        raise InputError(f"k={k} experts of {r}; it is at least 1 and at most r")
    if score not in ("abs", "signed"):
        raise InputError(f"score={score!r}; it is 'abs' or 'signed'")
    if k == r:
        return torch.ones_like(y, dtype=torch.bool)
    with torch.no_grad():
        scores = y + d.to(y)
        chosen = (scores.abs() if score == "abs" else scores).topk(k, dim=-1, sorted=False).indices
        return torch.zeros_like(y, dtype=torch.bool).scatter_(-1, chosen, True)


def route_groups(y: Tensor, d: Tensor, groups: Groups, score: Score = "abs") -> Tensor:
    """Return which experts each token takes when several sets of experts stand side by side.

    Parameters
    ----------
    y, d, score
        As in :func:`route`, of all sets in a row.
    groups
        For each set, its experts and how many of them a token takes.

    Raises
    ------
    InputError
        As in :func:`route`, and when the groups do not add up to ``r``.

    Examples
    --------
    >>> y = torch.tensor([3.0, -4.0, 1.0, 2.0])
    >>> route_groups(y, torch.zeros(4), [(2, 1), (2, 1)])
    tensor([False,  True, False,  True])
    """
    sizes = [r for r, _ in groups]
    if sum(sizes) != y.shape[-1]:
        raise InputError(f"groups of {sizes} experts for {y.shape[-1]} of them")
    parts = zip(torch.split(y, sizes, -1), torch.split(d, sizes), groups, strict=True)
    taken = [route(of_y, of_d, k, score) for of_y, of_d, (_, k) in parts]
    return taken[0] if len(taken) == 1 else torch.cat(taken, dim=-1)


def flylora_output(
    h: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    d: Tensor,
    groups: Groups,
    scale: float,
    score: Score = "abs",
) -> tuple[Tensor, Tensor]:
    """Add the adapter to a layer's output; also return the experts taken.

    Parameters
    ----------
    h
        Output of the layer, ``(..., out)``.
    x
        Its input, ``(..., in)``.
    A, B, d
        Frozen projection ``(r, in)``, experts ``(out, r)``, bias of the choice ``(r,)``.
    groups
        As in :func:`route_groups`: ``[(r, k)]`` for one task.
    scale
        ``alpha / r`` (not ``alpha / k``).
    score
        As in :func:`route`.

    Returns
    -------
    Tensor, Tensor
        ``(..., out)`` in the type of ``h``, and the boolean mask ``(..., r)``.

    Examples
    --------
    >>> x, A, B = torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.ones(3, 2)
    >>> flylora_output(torch.ones(1, 3), x, A, B, torch.zeros(2), [(2, 1)], 1.0)
    (tensor([[3., 3., 3.]]), tensor([[False,  True]]))
    """
    # Entries of A are of size 1/r: half precision would decide between answers it cannot tell
    # apart, so projection and choice are made in float32 or wider, under autocast too.
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x.to(wide), A.to(wide))
        taken = route_groups(y, d, groups, score)
        chosen = y * taken
    return add_low_rank(h, chosen, B, scale), taken


def count(taken: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Count how many tokens took each expert.

    Parameters
    ----------
    taken
        Mask ``(..., r)`` of :func:`route`.
    tokens
        Boolean ``(...)``: the tokens that count, without padding; None for all.

    Examples
    --------
    >>> count(torch.tensor([[True, False], [True, False]]), torch.tensor([True, False]))
    tensor([1., 0.])
    """
    if tokens is not None:
        taken = taken & tokens.bool().unsqueeze(-1)
    return taken.reshape(-1, taken.shape[-1]).sum(0, dtype=torch.float32)


def rebalance(d: Tensor, counts: Tensor, rate: float, groups: Groups | None = None) -> Tensor:
    """Return the next bias: experts taken less than the mean gain ``rate``, the others lose it.

    Parameters
    ----------
    d
        Bias of the choice ``(r,)``.
    counts
        Tokens per expert since the last time ``(r,)``, summed over processes.
    rate
        ``u``; 1e-3 in the paper's code.
    groups
        As in :func:`route_groups`; each has a mean of its own. None for one group.

    Examples
    --------
    >>> rebalance(torch.zeros(3), torch.tensor([4.0, 2.0, 0.0]), 0.1)
    tensor([-0.1000,  0.0000,  0.1000])
    """
    sizes = [len(counts)] if groups is None else [r for r, _ in groups]
    lacking = torch.cat([part.mean() - part for part in torch.split(counts, sizes)])
    return d + rate * torch.sign(lacking).to(d)
