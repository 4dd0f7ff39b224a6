"""Several FlyLoRA tasks as one: their experts side by side, each task choosing among its own.

Outputs are added, never factors: the choice depends on the token, so that neither the mean of the
``B`` nor any ``B A`` does what the tasks do together. The official merge averages factors, which
relies on one ``A`` for all tasks, while the paper's argument needs independent ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.adapters.flylora_routing import Groups, Score, flylora_output
from fullrank.core.errors import InputError


@dataclass(frozen=True)
class Experts:
    """FlyLoRA's numbers for one layer.

    Attributes
    ----------
    A, B, d
        Projection ``(r, in)``, experts ``(out, r)``, bias of the choice ``(r,)``.
    groups
        For each task, its experts and how many of them a token takes.
    scale
        ``alpha / r``.
    """

    A: Tensor
    B: Tensor
    d: Tensor
    groups: Groups
    scale: float

    def __call__(self, h: Tensor, x: Tensor, score: Score = "abs") -> tuple[Tensor, Tensor]:
        """Add to a layer's output ``h`` for its input ``x``; also return the experts taken."""
        return flylora_output(h, x, self.A, self.B, self.d, self.groups, self.scale, score)


@torch.no_grad()
def merge_experts(parts: Sequence[Experts], weights: Sequence[float] | None = None) -> Experts:
    """Return the experts whose output is the weighted sum of what several put out. It is exact.

    Parameters
    ----------
    parts
        One for each task, of the same layer. Sizes, ``k`` and scales may differ.
    weights
        One a task; 1 / (number of tasks) by default.

    Raises
    ------
    InputError
        When there is nothing to merge, weights are not finite or too many or few, or the tasks
        are of layers of other shapes.

    Examples
    --------
    >>> one = Experts(torch.ones(2, 3), torch.ones(4, 2), torch.zeros(2), [(2, 1)], 2.0)
    >>> merged = merge_experts([one, one])
    >>> merged.groups, tuple(merged.B.shape), float(merged.B[0, 0]) * merged.scale
    ([(2, 1), (2, 1)], (4, 4), 1.0)
    """
    if not parts:
        raise InputError("there is no task to merge; give at least one")
    shares = [1 / len(parts)] * len(parts) if weights is None else [float(w) for w in weights]
    if len(shares) != len(parts) or not all(math.isfinite(share) for share in shares):
        raise InputError(f"weights={shares}; {len(parts)} finite numbers are needed")
    shape = (parts[0].B.shape[0], parts[0].A.shape[1])
    for number, part in enumerate(parts):
        found = (part.B.shape[0], part.A.shape[1])
        if found != shape:
            raise InputError(f"task {number} is of a layer {found}, the ones before of {shape}")
    first = parts[0]
    return Experts(
        A=torch.cat([part.A.to(first.A) for part in parts]),
        B=torch.cat(
            [
                share * part.scale * part.B.to(first.B)
                for part, share in zip(parts, shares, strict=True)
            ],
            dim=1,
        ),
        d=torch.cat([part.d.to(first.d) for part in parts]),
        groups=[group for part in parts for group in part.groups],
        scale=1.0,
    )
