"""LoRA-GA's factors for one layer, from the mean gradient of its weight."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.linalg import randomized_svd, truncated_svd

Direction = Literal["ArB2r", "A2rBr", "ArBr", "random"]
Scale = Literal[
    "stable", "unit", "gd", "weightS", "peft_stable", "peft_unit", "peft_gd", "peft_weightS"
]

# Up to this shorter side an exact decomposition takes no longer than a sketch.
_EXACT = 128


class Start(NamedTuple):
    """What a layer starts from.

    Attributes
    ----------
    A, B
        ``(r, in)`` and ``(out, r)``.
    captured
        ``|G_2r| / |G|``: how much of the gradient the first step follows.
    """

    A: Tensor
    B: Tensor
    captured: float


def start_from_gradient(
    gradient: Tensor,
    rank: int,
    scaling: float,
    weight: Tensor,
    *,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    gamma: float = 16.0,
    generator: torch.Generator | int | None = 0,
) -> Start:
    """Return LoRA-GA's factors for one layer.

    Parameters
    ----------
    gradient
        ``(out, in)`` mean gradient of the weight.
    rank
        r, with ``2 r <= min(out, in)``.
    scaling
        s of the adapter.
    weight
        ``(out, in)``; ``"weightS"`` looks at its singular values.
    direction
        Which of the first 2r singular vectors ``A`` and ``B`` get: the first and the second half
        (``"ArB2r"``, default), the halves exchanged, odd and even ones, or random halves.
    scale
        ``"stable"`` (default): ``out^(1/4) / sqrt(gamma)`` times orthonormal factors;
        ``"unit"``: 1; ``"gd"``: 1 / s; ``"weightS"``: from the weight's singular values. With
        ``peft_`` in front: what PEFT 0.21 does, which scales ``B`` by the gradient's singular
        values, so that it depends on the scale of the loss.
    gamma
        16; 64 in the paper's T5 runs.
    generator
        Of the sketch of large matrices, and of ``"random"``.

    Raises
    ------
    InputError
        When ``2 r`` is above the shorter side, or the gradient's own rank is below r.

    Examples
    --------
    >>> G = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    >>> start = start_from_gradient(G, 2, 1.0, torch.eye(4), scale="unit")
    >>> (start.B @ start.A).abs().sum().item(), round(start.captured, 3)
    (2.0, 1.0)
    """
    norm = float(torch.linalg.vector_norm(gradient.float()))
    return start_from_triplets(
        *_decomposed(gradient, rank, generator),
        norm,
        rank,
        scaling,
        weight,
        direction=direction,
        scale=scale,
        gamma=gamma,
        generator=generator,
    )


def start_from_triplets(
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    norm: float,
    rank: int,
    scaling: float,
    weight: Tensor,
    *,
    direction: Direction = "ArB2r",
    scale: Scale = "stable",
    gamma: float = 16.0,
    generator: torch.Generator | int | None = 0,
) -> Start:
    """Return LoRA-GA's factors from the gradient's leading singular triplets.

    Parameters
    ----------
    U, S, Vh
        ``(out, 2r)``, ``(2r,)`` and ``(2r, in)``.
    norm
        Frobenius norm of the whole gradient.
    rank, scaling, weight, direction, scale, gamma, generator
        As :func:`start_from_gradient`.

    Raises
    ------
    InputError
        When the gradient's own rank is below r.
    """
    out, width = len(U), Vh.shape[1]
    rounding = max(out, width) * torch.finfo(S.dtype).eps * S[0]
    found = int(S.gt(rounding).sum())
    if found < rank:
        raise InputError(
            f"a gradient of rank {found} gives no start of rank {rank}: give more, longer or more "
            "varied batches, or a smaller rank"
        )
    in_A, in_B = _indices(direction, rank, generator)
    A, B, sizes = Vh[in_A], U[:, in_B], S[in_B]
    c = out**0.25 / gamma**0.5
    if scale == "stable":
        A, B = c * A, c * B
    elif scale == "gd":
        A, B = A / scaling, B / scaling
    elif scale == "weightS":
        size = (_values(weight, rank) / scaling).sqrt().mean()
        A, B = size * A, size * B
    elif scale.startswith("peft_"):
        B = B * sizes
        if scale == "peft_stable":
            B = c * B
        elif scale == "peft_gd":
            A, B = A / scaling, B / scaling
        elif scale == "peft_weightS" and sizes[0] > 0:
            B = B * (_values(weight, 1)[0] / sizes[0])
    captured = float(S.norm()) / max(norm, 1e-30)
    return Start(A.contiguous(), B.contiguous(), min(captured, 1.0))


def _decomposed(
    gradient: Tensor, rank: int, generator: torch.Generator | int | None
) -> tuple[Tensor, Tensor, Tensor]:
    short = min(gradient.shape)
    if 2 * rank > short:
        raise InputError(
            f"rank {rank} needs {2 * rank} directions; a {gradient.shape[0]} x "
            f"{gradient.shape[1]} weight has {short}"
        )
    if short <= max(_EXACT, 4 * rank):
        return truncated_svd(gradient, 2 * rank)
    return randomized_svd(
        gradient, 2 * rank, oversample=2 * rank, iterations=4, generator=generator
    )


def _indices(
    direction: Direction, rank: int, generator: torch.Generator | int | None
) -> tuple[Tensor, Tensor]:
    """Which singular vectors A and B get."""
    every = torch.arange(2 * rank)
    if direction == "ArBr":
        return every[1::2], every[::2]
    if direction == "random":
        if not isinstance(generator, torch.Generator):
            generator = torch.Generator().manual_seed(generator or 0)
        every = torch.randperm(2 * rank, generator=generator)
    first, second = every[:rank], every[rank:]
    return (second, first) if direction == "A2rBr" else (first, second)


def _values(weight: Tensor, count: int) -> Tensor:
    values: Tensor = torch.linalg.svdvals(weight.float())
    return values[:count]
