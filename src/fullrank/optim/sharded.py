"""Weights that are spread over processes (DTensor, as ``fully_shard`` makes them).

What acts on each number alone is done on the local part, with state spread as the weight is. What
needs the whole matrix (to project it, or its rows) gathers weight and gradient, does the same
arithmetic on every process, and keeps its small state whole on each; the weight's local part is
then written. Every process so takes the step that one alone would take.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fullrank.core.errors import InputError


def is_sharded(tensor: Any) -> bool:
    """Whether this is a tensor spread over processes."""
    # Whoever has made one has imported this; the import is too slow for those who never do.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """Return the part that this process holds; it shares memory with the whole."""
    part: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return part


def gathered(tensor: Tensor) -> Tensor:
    """Return the whole, on every process."""
    whole: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return whole


def norm(tensor: Tensor) -> Tensor:
    """Return the Euclidean norm of the whole."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return gathered(torch.linalg.vector_norm(tensor, dtype=wide))


def lines(tensor: Any, dim: int) -> Tensor:
    """Return which indices of a dimension this process holds of a spread tensor, ascending."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = tensor.device_mesh
    every = torch.arange(tensor.shape[dim], device=tensor.device)
    same = DTensor.from_local(every, mesh, [Replicate()] * mesh.ndim, run_check=False)
    own: Tensor = same.redistribute(placements=along(tensor, dim)).to_local()
    return own


def along(tensor: Any, dim: int) -> list[Any]:
    """Return how a vector is spread that has one number for each index of a dimension."""
    from torch.distributed.tensor import Replicate, Shard

    axis = dim % tensor.dim()
    return [Shard(0) if p.is_shard(axis) else Replicate() for p in tensor.placements]


def summed(parts: Tensor, like: Any) -> Tensor:
    """Add up what the processes that hold different parts of a spread tensor have of a whole."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Replicate() if p.is_replicate() else Partial() for p in like.placements]
    return gathered(DTensor.from_local(parts, like.device_mesh, placements, run_check=False))


def check_placements(weight: Any, name: str) -> None:
    """Raise :class:`InputError` on a weight that is spread in a way that sums cannot follow."""
    from torch.distributed.tensor import Replicate, Shard

    for placement in weight.placements:
        if not isinstance(placement, Shard | Replicate):
            raise InputError(
                f"{name} is spread as {placement}; only Shard and Replicate can be followed. "
                "Use FSDP2 or tensor parallelism for this weight, not both"
            )


def zeros(shape: tuple[int, ...], dtype: torch.dtype, like: Tensor) -> Tensor:
    """Return zeros that are spread as ``like``, whose shape they have."""
    if tuple(like.shape) == shape and is_sharded(like):
        return torch.zeros_like(like, dtype=dtype)
    return torch.zeros(shape, dtype=dtype, device=like.device)


def spread(value: Tensor, like: Tensor) -> Tensor:
    """Bring a saved tensor to the form of one at work: whole, or spread as that is."""
    if not is_sharded(like):
        return gathered(value)
    if is_sharded(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)  # type: ignore[attr-defined]


def scatter_(param: Tensor, whole: Tensor) -> None:
    """Write this process' part of a whole that every process holds."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = param.device_mesh  # type: ignore[attr-defined]
    same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
    local(param).copy_(local(same.redistribute(placements=param.placements)))  # type: ignore[attr-defined]


def agree(squares: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Sum local squared norms over the processes that share these tensors, in one go a mesh.

    Where parts are held more than once they count more than once: it is for telling what is
    finite, and what is zero.
    """
    meshes: dict[Any, list[int]] = {}
    for i, tensor in enumerate(tensors):
        if is_sharded(tensor):
            meshes.setdefault(tensor.device_mesh, []).append(i)  # type: ignore[attr-defined]
    if not meshes:
        return squares
    import torch.distributed as dist

    for mesh, members in meshes.items():
        part = squares[members]
        for dim in range(mesh.ndim):
            dist.all_reduce(part, group=mesh.get_group(dim))
        squares[members] = part
    return squares
