"""How the rank of a response's hidden states grows, token by token: VERL's three measures.

The rank of the whole (ER), its velocity (ERV) and its acceleration (ERA) along the tokens
(arXiv 2509.23808). Prefixes of a response share one Gram matrix; in float32 long ones share its
Cholesky factors (:mod:`fullrank.spectra.prefix_ranks`). Only where squares lose what float64 has,
in rows that are nearly dependent, are a prefix's own rows decomposed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.linalg.checks import all_finite
from fullrank.spectra.prefix_ranks import prefix_ranks

# In the official code: beside the sum of singular values, and in the logarithm.
_EPS = 1e-8
# Prefixes of up to so many rows are no work as eigenvalue problems of their own.
_SMALL = 64
# Squared singular values below this share of the largest have lost digits in a Gram matrix; as
# much is lost of the spread of rows whose common mean is larger by the root of the inverse.
_LOST = 1e-9


class RankDynamics(NamedTuple):
    """One number a response in each.

    Attributes
    ----------
    er
        ``(B,)`` effective rank of all of a response's hidden states, rows centred; 0 for fewer
        than two.
    erv
        ``(B,)`` velocity: mean of how far each prefix's rank is from the mean of those before it;
        0 with fewer than two prefixes.
    era
        ``(B,)`` acceleration: mean change of that from prefix to prefix; 0 with fewer than three.
    """

    er: Tensor
    erv: Tensor
    era: Tensor


@torch.no_grad()
def rank_dynamics(
    H: Tensor, mask: Tensor | None = None, stride: int = 40, max_tokens: int | None = 512
) -> RankDynamics:
    """Effective rank, its velocity and acceleration along each response.

    Parameters
    ----------
    H
        ``(B, T, D)`` array or tensor of last-layer states, the row of a token being the state
        that produced it. What is given in float64 is worked on in float64, and exact to 1e-8 of
        it. What is given in float32 or less has longer prefixes in float32: see below.
    mask
        ``(B, T)``, True on a response's tokens, anywhere in the row; None takes all.
    stride
        s: prefixes end every so many tokens; 40 (official launch script).
    max_tokens
        Velocity and acceleration look at the last so many tokens, 512 in the official code; None
        at all.

    Returns
    -------
    RankDynamics
        In float64, on the device of ``H``. For float32, ranks of more than 64 tokens (and
        not more than the width) are off by about 1e-6 of theirs where spectra are even, by up to
        6e-4 where one direction holds almost all; others to rounding.

    Raises
    ------
    InputError
        On other shapes, ``stride`` below 1, or values that are not finite under the mask.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> hidden = torch.randn(2, 100, 16, generator=generator)
    >>> found = rank_dynamics(hidden, stride=10)
    >>> found.er.round(decimals=1).tolist(), bool((found.erv > 0).all())
    ([15.6, 15.7], True)
    """
    hidden, lengths = _packed(H, mask, stride, max_tokens)
    limit = hidden.shape[1] if max_tokens is None else max_tokens
    kept = lengths.clamp(max=limit)
    window = _last(hidden, lengths, kept)
    counts = ((kept + stride - 1) // stride - 1).clamp_min(0)
    sizes = [j * stride + 1 for j in range(1, int(counts.max()) + 1)]
    width = hidden.shape[2]
    # Whole windows and prefixes of middle size, where float32 is enough.
    smallest = width if hidden.dtype == torch.float64 else _SMALL
    er, series = _many_ranks(window, kept, sizes, smallest)
    # A window that is not all of a response, few tokens, and more tokens than dimensions.
    other = (kept < lengths) | (kept <= smallest) | (kept > width)
    if bool(other.any()):
        er[other] = _ranks(hidden[other], lengths[other])
    few = [j for j, size in enumerate(sizes) if size <= smallest or size > width]
    for j, ranks in _one_by_one(window, kept, counts, {j: sizes[j] for j in few}):
        series[:, j] = ranks
    return RankDynamics(er, *_differences(series, counts))


def _packed(
    hidden: Tensor, mask: Tensor | None, stride: int, max_tokens: int | None
) -> tuple[Tensor, Tensor]:
    """States with the tokens of each response at the front, and how many there are."""
    hidden = torch.as_tensor(hidden)
    if hidden.ndim != 3 or 0 in hidden.shape or not hidden.is_floating_point():
        raise InputError(
            f"hidden states of shape {tuple(hidden.shape)} and {hidden.dtype}; expected floating "
            "point of (responses, tokens, width)"
        )
    if stride < 1 or (max_tokens is not None and max_tokens < 1):
        raise InputError(f"stride={stride}, max_tokens={max_tokens}; expected at least 1")
    rows, length = hidden.shape[:2]
    if mask is None:
        mask = torch.ones(rows, length, dtype=torch.bool, device=hidden.device)
    mask = torch.as_tensor(mask, device=hidden.device)
    if mask.shape != (rows, length):
        raise InputError(
            f"a mask of shape {tuple(mask.shape)} for {rows} responses of {length} tokens"
        )
    mask = mask.bool()
    lengths = mask.sum(1)
    real = torch.arange(length, device=hidden.device) < lengths[:, None]
    packed = hidden
    if not torch.equal(mask, real):
        order = mask.logical_not().to(torch.int8).argsort(dim=1, stable=True)
        packed = hidden.gather(1, order[..., None].expand_as(hidden))
    packed = (packed if packed.dtype == torch.float64 else packed.float()).contiguous()
    if not real.all():
        packed = torch.where(real[..., None], packed, 0.0)
    if not all_finite(packed):
        raise InputError("hidden states hold NaN or infinite values on a response's tokens")
    return packed[:, : max(int(lengths.max()), 1)], lengths


def _last(hidden: Tensor, lengths: Tensor, kept: Tensor) -> Tensor:
    """Move the last ``kept`` of each response's ``lengths`` rows to the front."""
    most = max(int(kept.max()), 1)
    if torch.equal(kept, lengths):
        return hidden[:, :most]
    start = (lengths - kept)[:, None]
    at = (start + torch.arange(most, device=hidden.device)).clamp(max=hidden.shape[1] - 1)
    return hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[2]))


def _ranks(hidden: Tensor, lengths: Tensor) -> Tensor:
    """Effective rank of each response's first ``lengths`` rows; rows behind them are zero."""
    ranks = hidden.new_zeros(len(hidden), dtype=torch.float64)
    many = lengths >= 2
    lengths = lengths[many]
    centred = _less_mean(hidden[many].double(), lengths)
    tall = centred.shape[1] > centred.shape[2]
    gram = centred.mT @ centred if tall else centred @ centred.mT
    exact = hidden.dtype == torch.float64
    most = (lengths - 1).clamp(max=centred.shape[2])
    ranks[many] = _effective_rank(gram, most, exact, lambda hard: centred[hard])
    return ranks


def _less_mean(rows: Tensor, lengths: Tensor) -> Tensor:
    """Rows minus the mean of each sequence's first ``lengths``; zero behind them."""
    inside = (torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]).to(rows)
    weights = (inside / lengths.clamp_min(1)[:, None])[:, None]
    rows = rows - weights @ rows
    rows *= inside[..., None]
    # What is left of rows that are all alike is one rounding, and alike.
    rows -= weights @ rows
    rows *= inside[..., None]
    return rows


def _many_ranks(
    window: Tensor, kept: Tensor, sizes: list[int], smallest: int
) -> tuple[Tensor, Tensor]:
    """Effective ranks of whole windows ``(B,)`` and of prefixes ``(B, K)`` of middle sizes.

    All of them from a few factorisations; 0 for the sizes that :func:`_one_by_one` is for.
    """
    width = window.shape[2]
    series = window.new_zeros(len(window), len(sizes), dtype=torch.float64)
    middle = [j for j, size in enumerate(sizes) if smallest < size <= width]
    if not middle and not bool(((kept > smallest) & (kept <= width)).any()):
        return series.new_zeros(len(window)), series
    wanted = torch.tensor([sizes[j] for j in middle], dtype=torch.int64, device=kept.device)
    # The last column is that of the whole window. Beyond it no prefix counts.
    whole = kept.clamp(2, width)[:, None]
    wanted = torch.cat([torch.minimum(wanted[None], whole), whole], dim=1)
    found = prefix_ranks(window[:, : int(wanted.max())], wanted, _EPS)
    series[:, middle] = found[:, :-1]
    return found[:, -1].clone(), series


def _one_by_one(
    window: Tensor, kept: Tensor, counts: Tensor, sizes: Mapping[int, int]
) -> Iterator[tuple[int, Tensor]]:
    """Yield ``(j, ranks (B,))`` of the j-th prefixes, by an eigenvalue problem for each size."""
    if not sizes:
        return
    width, exact = window.shape[2], window.dtype == torch.float64
    # Centring a prefix takes away any constant; what is large in common is best gone first.
    most = max(sizes.values())
    rows = _less_mean(window[:, :most].double(), kept.clamp(max=most))
    short = max((size for size in sizes.values() if size <= width), default=0)
    gram = rows[:, :short] @ rows[:, :short].mT
    scatter = total = torch.zeros((), dtype=gram.dtype, device=gram.device)
    done = 0
    for j, size in sizes.items():
        there = counts > j
        if size <= width:
            prefix = gram[there, :size, :size]
            squares = prefix.diagonal(dim1=1, dim2=2).sum(1)
            centred = _centred(prefix)
        else:
            # Wider than it is long no more: the other product is smaller, and has full rank.
            new = rows[:, done:size]
            scatter, total, done = scatter + new.mT @ new, total + new.sum(1), size
            mean = total / size
            squares = scatter.diagonal(dim1=1, dim2=2).sum(1)[there]
            centred = (scatter - size * mean[:, :, None] * mean[:, None, :])[there]
        ranks = gram.new_zeros(len(window))
        ranks[there] = _effective_rank(
            centred,
            torch.full_like(kept[there], min(size - 1, width)),
            exact,
            lambda hard, there=there, size=size: _less_mean(  # type: ignore[misc]
                rows[there][hard, :size], kept[there][hard].clamp(max=size)
            ),
            squares,
        )
        yield j, ranks


def _centred(gram: Tensor) -> Tensor:
    """Gram matrix of the rows minus their mean."""
    by_row = gram.mean(-1, keepdim=True)
    centred: Tensor = gram - by_row - by_row.mT + by_row.mean(-2, keepdim=True)
    return centred


def _effective_rank(
    gram: Tensor,
    most: Tensor,
    exact: bool,
    rows: Callable[[Tensor], Tensor],
    squares: Tensor | None = None,
) -> Tensor:
    """Effective rank of matrices ``(B, n, n)`` given by a Gram matrix each.

    Parameters
    ----------
    gram, most
        Of the centred rows, and the rank ``(B,)`` that they can have.
    exact
        Whether digits of small singular values count.
    rows
        From which of the matrices ``(B,)`` to their centred rows.
    squares
        ``(B,)`` sum of the squares of the rows that were centred in the Gram matrix.
    """
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    n = values.shape[1]
    first = (n - most).clamp_min(0)
    # What is beyond the largest possible rank is rounding.
    values = values * (torch.arange(n, device=values.device) >= first[:, None])
    sigma = values.sqrt()
    hard = torch.zeros_like(most, dtype=torch.bool)
    if squares is not None:
        hard |= values.sum(1) < _LOST * squares
    if exact:
        hard |= values.gather(1, first.clamp(max=n - 1)[:, None])[:, 0] < _LOST * values[:, -1]
    if bool(hard.any()):
        own = torch.linalg.svdvals(rows(hard))
        sigma[hard] = torch.nn.functional.pad(own, (0, n - own.shape[1]))
    p = sigma / (sigma.sum(-1, keepdim=True) + _EPS)
    entropy: Tensor = -(p * (p + _EPS).log()).sum(-1)
    return entropy.exp()


def _differences(series: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Velocity and acceleration of each response's series of ranks."""
    places = torch.arange(1, series.shape[1] + 1, device=series.device)
    before = (series.cumsum(1) - series) / (places - 1).clamp_min(1)
    real = (places >= 2) & (places <= counts[:, None])
    change = torch.where(real, series - before, 0.0)
    velocity = change.sum(1) / (counts - 1).clamp_min(1)
    if series.shape[1] < 3:
        return velocity, torch.zeros_like(velocity)
    last = change.gather(1, (counts - 1).clamp_min(0)[:, None])[:, 0]
    # The sum of changes of the change is the last one minus the first.
    acceleration = (last - change[:, 1]) / (counts - 2).clamp_min(1)
    return velocity, torch.where(counts >= 3, acceleration, 0.0)
