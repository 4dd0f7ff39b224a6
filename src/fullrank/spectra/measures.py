"""Numbers that say how much rank a matrix really uses.

All of them look at singular values alone. They take a matrix ``(N, K)`` and return a float, or a
batch ``(..., N, K)`` and return a tensor of the leading shape; with ``input="singular_values"``
the last dimension holds singular values instead. Everything is computed in float64.
A matrix of zeros has rank 0 by every measure, but where :func:`effective_rank` is asked for VERL's.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.spectra.values import Input, singular_values

EpsIn = Literal["p", "log"]


def _result(values: Tensor) -> float | Tensor:
    return float(values) if values.ndim == 0 else values


@torch.no_grad()
def effective_rank(
    x: Any,
    *,
    input: Input = "matrix",
    center: bool = False,
    eps: float = 0.0,
    eps_in: EpsIn = "p",
    mask: Any = None,
) -> float | Tensor:
    """Exponential of the entropy of the singular values (Roy and Vetterli 2007).

    ``exp(-sum_k p_k log p_k)`` with ``p = sigma / sum(sigma)``: 1 for one direction, K for K
    equally strong ones.

    Parameters
    ----------
    x
        ``(N, K)`` or ``(..., N, K)`` array or tensor, or singular values ``(..., k)``.
    input
        ``"matrix"`` or ``"singular_values"``.
    center
        Subtract the mean row first.
    eps, eps_in
        0 is the definition. ``"p"`` adds eps to every ``p_k`` without renormalising (RankMe,
        1e-7); ``"log"`` adds it to the sum that p is divided by and inside the logarithm (VERL,
        1e-8).
    mask
        ``(..., N)``, False for rows to leave out, such as padding.

    Returns
    -------
    float or Tensor
        A tensor for batches. 0 for a zero matrix; with ``eps_in="log"`` and an eps, 1, which is
        what the formula says, but 0 for fewer than two rows that are centred (VERL).

    Raises
    ------
    InputError
        On 1-D, empty or integer input, NaN or infinity, or a mask of another shape.

    Examples
    --------
    >>> effective_rank([3.0, 3.0, 0.0], input="singular_values")
    2.0
    """
    if eps_in not in get_args(EpsIn):
        raise InputError(f"eps_in={eps_in!r}; it is 'p' or 'log'")
    if not eps >= 0:
        raise InputError(f"eps is {eps}; it must not be negative")
    values = singular_values(x, input, center, mask)
    largest = torch.where(values[..., :1] > 0, values[..., :1], 1.0)
    values = _relative(values)
    total = values.sum(-1, keepdim=True)
    zero = total <= 0
    if eps_in == "log":
        if eps > 0:
            alone = _rows(x, mask) < 2 if center else torch.tensor(False)
            zero = zero & alone.to(zero.device)
        p = values / (total + eps / largest).clamp_min(1e-300)
        entropy = -(p * (p + eps).clamp_min(1e-300).log()).sum(-1)
    else:
        p = values / torch.where(zero, 1.0, total) + eps
        entropy = -torch.special.xlogy(p, p).sum(-1)
    return _result(torch.where(zero.squeeze(-1), 0.0, entropy.exp()))


def _rows(x: Any, mask: Any) -> Tensor:
    """How many rows of a matrix count, ``(..., 1)``."""
    if mask is None:
        return torch.tensor(np.shape(x)[-2])
    return torch.as_tensor(mask).bool().sum(-1, keepdim=True)


@torch.no_grad()
def stable_rank(x: Any, *, input: Input = "matrix", center: bool = False) -> float | Tensor:
    """Squared Frobenius norm over squared spectral norm: ``sum(sigma^2) / sigma_1^2``.

    See :func:`effective_rank` for the parameters and errors.

    >>> stable_rank([2.0, 1.0, 0.0], input="singular_values")
    1.25
    """
    p = _relative(singular_values(x, input, center))
    return _result(p.square().sum(-1))


@torch.no_grad()
def nuclear_norm(x: Any, *, input: Input = "matrix", center: bool = False) -> float | Tensor:
    """Sum of the singular values.

    See :func:`effective_rank` for the parameters and errors.

    >>> nuclear_norm([2.0, 1.0, 0.0], input="singular_values")
    3.0
    """
    return _result(singular_values(x, input, center).sum(-1))


@torch.no_grad()
def participation_ratio(x: Any, *, input: Input = "matrix", center: bool = False) -> float | Tensor:
    """``(sum lambda)^2 / sum lambda^2`` over the squared singular values ``lambda``.

    See :func:`effective_rank` for the parameters and errors.

    >>> participation_ratio([2.0, 2.0, 0.0], input="singular_values")
    2.0
    """
    energy = _relative(singular_values(x, input, center)).square()
    squares = energy.square().sum(-1)
    ratio = energy.sum(-1).square() / torch.where(squares > 0, squares, 1.0)
    return _result(ratio)


@torch.no_grad()
def energy_rank(
    x: Any, tau: float = 0.9, *, input: Input = "matrix", center: bool = False
) -> int | Tensor:
    """Smallest rank whose singular values hold the share ``tau`` of the sum of squares.

    The relative squared error of the best approximation of that rank is at most ``1 - tau``.
    See :func:`effective_rank` for the other parameters and errors.

    Parameters
    ----------
    x, input, center
        As for :func:`effective_rank`.
    tau
        Share in (0, 1].

    >>> energy_rank([3.0, 1.0, 0.0], 0.9, input="singular_values")
    1
    """
    if not 0 < tau <= 1:
        raise InputError(f"the share of energy is {tau}; it must lie in (0, 1]")
    energy = _relative(singular_values(x, input, center)).square().cumsum(-1)
    # As many as stay below the share, and one more.
    rank = (energy < tau * energy[..., -1:]).sum(-1) + (energy[..., -1] > 0)
    return int(rank) if rank.ndim == 0 else rank


def _relative(values: Tensor) -> Tensor:
    """Divide by the largest, so that squares neither overflow nor vanish."""
    largest = values[..., :1]
    return values / torch.where(largest > 0, largest, 1.0)
