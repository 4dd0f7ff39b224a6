"""Sums over the channels of a weight, which is here as a whole or spread over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fullrank.optim.sharded import along, is_sharded


class Channels:
    """Sums over a whole weight's channels.

    Parameters
    ----------
    dim
        Dimension that counts them.

    Examples
    --------
    >>> a, b = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    >>> Channels(0).dots(a, b), Channels(1).dots(a, b)
    (tensor([1., 7.]), tensor([4., 4.]))
    """

    def __init__(self, dim: int = 0) -> None:
        self.dim = dim

    def dots(self, a: Tensor, b: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Products of two tensors, ``(channels,)`` in float32 at least.

        With ``scratch``, a flat array that has room for one of them, nothing is allocated.
        """
        a, b = rows(a, self.dim), rows(b, self.dim)
        if scratch is None or scratch.dtype != a.dtype:
            found: Tensor = torch.linalg.vecdot(a, b)
            return found
        return torch.mul(a, b, out=scratch[: a.numel()].view(a.shape)).sum(1)

    def norms(self, tensor: Tensor) -> Tensor:
        """Norms of the channels, ``(channels,)`` in float32 at least."""
        found: Tensor = torch.linalg.vector_norm(rows(tensor, self.dim), dim=1)
        return found

    def beside(self, values: Tensor, tensor: Tensor) -> Tensor:
        """One number a channel, or one for all, in a shape that broadcasts against a tensor."""
        if values.dim() == 0:
            return values
        shape = [1] * tensor.dim()
        shape[self.dim] = -1
        return values.view(shape)


class ShardedChannels(Channels):
    """The same for a weight of which each process holds a part: two small exchanges.

    Tensors that go in are local parts. Numbers by channel are whole, and the same on every
    process, but for those that are put beside a part.

    Parameters
    ----------
    weight
        A DTensor.
    dim
        Dimension that counts the channels.
    """

    def __init__(self, weight: Any, dim: int = 0) -> None:
        from torch.distributed.tensor import Partial, Replicate, Shard

        super().__init__(dim)
        self._mesh, self._count = weight.device_mesh, weight.shape[dim]
        axis = dim % weight.dim()
        # A part has some of the channels, or a part of every channel's sum.
        self._sums = [
            Replicate() if p.is_replicate() else Shard(0) if p.is_shard(axis) else Partial()
            for p in weight.placements
        ]
        self._own = along(weight, dim)

    def dots(self, a: Tensor, b: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Products of two tensors by channel."""
        return self._whole(super().dots(a, b, scratch))

    def norms(self, tensor: Tensor) -> Tensor:
        """Norms of the channels."""
        return self._whole(super().norms(tensor).square_()).sqrt_()

    def beside(self, values: Tensor, tensor: Tensor) -> Tensor:
        """One number for each channel of this process' part, or one for all."""
        if values.dim() == 0:
            return values
        from torch.distributed.tensor import DTensor, Replicate

        whole = [Replicate()] * self._mesh.ndim
        same = DTensor.from_local(values, self._mesh, whole, run_check=False)
        return super().beside(same.redistribute(placements=self._own).to_local(), tensor)

    def _whole(self, sums: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        found: Tensor = DTensor.from_local(
            sums,
            self._mesh,
            self._sums,
            run_check=False,
            shape=torch.Size([self._count]),
            stride=(1,),
        ).full_tensor()
        return found


def channels_of(weight: Tensor, dim: int) -> Channels:
    """Return the sums for a weight, whole or spread."""
    return ShardedChannels(weight, dim) if is_sharded(weight) else Channels(dim)


def rows(tensor: Tensor, channel_dim: int = 0) -> Tensor:
    """Read a tensor as ``(channels, rest)`` in float32 at least; a view where that is possible.

    >>> rows(torch.zeros(4, 3, 2, 2)).shape, rows(torch.zeros(4, 3, 2, 2), channel_dim=1).shape
    (torch.Size([4, 12]), torch.Size([3, 16]))
    """
    matrix = tensor
    if channel_dim != 0 or tensor.dim() != 2:
        matrix = tensor.movedim(channel_dim, 0).flatten(1)
    return matrix.to(torch.promote_types(tensor.dtype, torch.float32))
