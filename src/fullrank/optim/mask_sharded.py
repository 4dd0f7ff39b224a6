"""The entries of a mask in a weight that is spread over processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fullrank.optim.sharded import lines, local, summed


class SpreadMask:
    """Gathers and writes a mask's entries where each process holds a part of the matrix.

    What is exchanged is one vector of the mask's k entries; the matrix is not put together.

    Parameters
    ----------
    indices
        ``(k,)`` flat indices of the whole matrix, ascending; the same on every process.
    weight
        The ``(m, n)`` DTensor, whose gradient is spread alike.
    """

    def __init__(self, indices: Tensor, weight: Any) -> None:
        rows, columns = lines(weight, 0), lines(weight, 1)
        row, inside_rows = _places(rows, indices // weight.shape[1])
        column, inside_columns = _places(columns, indices % weight.shape[1])
        # Which of the k entries this process holds, and where: as long as the mask stays.
        self._mine = (inside_rows & inside_columns).nonzero().squeeze(1)
        self._place = (row * len(columns) + column)[self._mine]
        self._count = len(indices)

    def down(self, tensor: Tensor) -> Tensor:
        """Gather the entries, ``(k,)`` on every process."""
        part = local(tensor)
        found = part.new_zeros(self._count)
        found[self._mine] = part.reshape(-1)[self._place]
        return summed(found, tensor)

    def put(self, tensor: Tensor, small: Tensor) -> None:
        """Write the entries that this process holds."""
        part = local(tensor)
        part.view(-1)[self._place] = small[self._mine].to(part.dtype)


def _places(held: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where in ascending numbers others are, and whether they are there."""
    if not len(held):
        return torch.zeros_like(wanted), torch.zeros_like(wanted, dtype=torch.bool)
    place = torch.searchsorted(held, wanted).clamp_max(len(held) - 1)
    return place, held[place] == wanted
