"""Optimizers on leading singular vectors: what GaLore, Fira and GradNormLoRP choose alike."""

from __future__ import annotations

from typing import Any, Literal

import torch

from fullrank.optim.base import SubspaceOptimizer
from fullrank.optim.iterative import IterativeSubspace
from fullrank.optim.subspace import Projection, SVDSubspace, side_of

Refresh = Literal["svd", "subspace"]
Gemm = Literal["bfloat16"]


class ProjectedOptimizer(SubspaceOptimizer):
    """A subspace optimizer whose bases are leading singular vectors of the gradient.

    Its groups have the keys that users of GaLore know: ``rank``, ``update_proj_gap``,
    ``proj_type``; and ``refresh`` and ``gemm``.
    """

    def subspace(self, group: dict[str, Any], rank: int, shape: tuple[int, int]) -> Projection:
        """Leading singular vectors, exact or by warm-started iteration."""
        kind = SVDSubspace if group["refresh"] == "svd" else IterativeSubspace
        return kind(rank, side_of(group["proj_type"], shape), gemm=gemm_dtype(group))


def gemm_dtype(group: dict[str, Any]) -> torch.dtype | None:
    """Return what a group's ``gemm`` rounds factors of matrix products to."""
    return torch.bfloat16 if group["gemm"] == "bfloat16" else None
