"""LoRA-SB's factors for one layer: the first update that full fine-tuning would make, cut to r."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.linalg import randomized_svd, truncated_svd

# Up to this shorter side the decomposition is exact: the spectra of sign matrices are flat, and
# what a sketch of few columns leaves out of them is large.
_EXACT = 4096
# Of R with the weight's own factors (LoRA-XS, arXiv 2405.17604).
_XS_STD = 1e-5


class Start(NamedTuple):
    """What a layer starts from: ``W = W0 + s B R A``.

    Attributes
    ----------
    A, B
        ``(r, in)`` and ``(out, r)``, frozen.
    R
        ``(r, r)``, trained.
    captured
        Share of the update's norm that ``s B R A`` has.
    """

    A: Tensor
    B: Tensor
    R: Tensor
    captured: float


def first_update(gradient: Tensor, lr: float) -> Tensor:
    """Return ``-lr sign(G)``, what AdamW's first step adds to a weight.

    Parameters
    ----------
    gradient
        ``(out, in)``, up to a positive factor. Where it is exactly 0, as in rows of tokens that
        never occurred, nothing is added.
    lr
        Learning rate of the first step.

    Examples
    --------
    >>> first_update(torch.tensor([[3.0, -0.5, 0.0]]), 0.25)
    tensor([[-0.2500,  0.2500, -0.0000]])
    """
    return gradient.sign().mul_(-lr)


def start_from_update(
    update: Tensor, rank: int, scaling: float = 1.0, seed: torch.Generator | int = 0
) -> Start:
    """Cut an update to its leading singular triplets: ``s B R A`` is their product.

    Parameters
    ----------
    update
        ``(out, in)``.
    rank
        r, at most the shorter side.
    scaling
        s of the adapter, which is divided out of R.
    seed
        Of the sketch of matrices with more than 4096 rows and columns.

    Examples
    --------
    >>> start = start_from_update(torch.diag(torch.tensor([3.0, 1.0, 2.0])), 2, scaling=0.5)
    >>> torch.diag(0.5 * start.B @ start.R @ start.A).tolist(), start.R.diag().tolist()
    ([3.0, 0.0, 2.0], [6.0, 4.0])
    """
    if min(update.shape) <= _EXACT:
        U, S, Vh = truncated_svd(update, rank)
    else:
        U, S, Vh = randomized_svd(update, rank, oversample=2 * rank, iterations=8, generator=seed)
    whole = float(torch.linalg.vector_norm(update))
    captured = float(torch.linalg.vector_norm(S)) / max(whole, 1e-30)
    return Start(Vh, U, torch.diag(S / scaling), min(captured, 1.0))


def start_from_weight(weight: Tensor, rank: int, seed: torch.Generator | int = 0) -> Start:
    """LoRA-XS: the weight's leading triplets, ``B = U S`` and ``A = V^T``, around a tiny R.

    Parameters
    ----------
    weight
        ``(out, in)``.
    rank
        r, at most the shorter side.
    seed
        Of R, normal with standard deviation 1e-5.

    Examples
    --------
    >>> start = start_from_weight(torch.diag(torch.tensor([3.0, 1.0, 2.0])), 2)
    >>> (start.B @ start.A).diag().tolist(), bool(start.R.abs().max() < 1e-4)
    ([3.0, 0.0, 2.0], True)
    """
    U, S, Vh = truncated_svd(weight, rank)
    generator = seed
    if not isinstance(generator, torch.Generator):
        generator = torch.Generator().manual_seed(generator)
    R = torch.randn(rank, rank, generator=generator) * _XS_STD
    return Start(Vh, U * S, R.to(U), 0.0)
