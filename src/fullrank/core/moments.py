"""Streaming first and second moments: any number of batches in constant memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fullrank.core.errors import InputError


class Sums:
    """Count and sums over vectors seen in batches, in float64: what two kinds of moments share.

    A subclass names its tensors in ``sums``, each a plain sum over samples, and says in ``_add``
    what a sample adds to them; sums of shards are then the shards' sums added up.

    Parameters
    ----------
    width
        Length d of each vector.
    device
        Where the sums live; the CPU by default. Batches are moved there.
    """

    sums: tuple[str, ...] = ("sum",)

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        if width < 1:
            raise InputError(f"vectors of width {width}; it must be at least 1")
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64, device=device)

    @property
    def width(self) -> int:
        """Length of each vector."""
        return self.sum.numel()

    @torch.no_grad()
    def update(self, batch: Tensor, mask: Tensor | None = None) -> None:
        """Add samples: ``(..., d)``; ``mask`` of the leading shape, False where to leave out.

        Raises
        ------
        InputError
            On another width, integers, or values that are not finite (nothing is added then).
        """
        if batch.dim() == 0 or batch.shape[-1] != self.width:
            raise InputError(
                f"a batch of shape {tuple(batch.shape)}; these moments are of width {self.width}"
            )
        if not batch.is_floating_point():
            raise InputError(f"moments are taken of floating-point values, not {batch.dtype}")
        rows = batch.reshape(-1, self.width)
        if mask is not None:
            if mask.shape != batch.shape[:-1]:
                raise InputError(
                    f"a mask of shape {tuple(mask.shape)} for a batch of {tuple(batch.shape)}; "
                    "one value a vector is expected"
                )
            rows = rows[mask.reshape(-1).to(device=rows.device, dtype=torch.bool)]
        x = rows.to(device=self.sum.device, dtype=torch.float64)
        total = x.sum(0)
        # One value that is not finite makes its column's sum so: no need to look at them all.
        if not torch.isfinite(total).all():
            raise InputError("a batch holds NaN or infinite values; the moments are unchanged")
        self.count += x.shape[0]
        self.sum += total
        self._add(x)

    def _add(self, rows: Tensor) -> None:
        """Add rows ``(n, d)``, float64, to the sums of the subclass."""

    @torch.no_grad()
    def move(self, by: Tensor) -> None:
        """Make these the sums of the same samples, each minus a vector ``(d,)``.

        Near zero squares keep the digits that a large common mean takes from them.
        """
        by = by.to(self.sum)
        self._move(by)
        self.sum -= self.count * by

    def _move(self, by: Tensor) -> None:
        """As :meth:`move`, of the subclass's sums; ``sum`` is still that of before."""

    def merge(self, other: Sums) -> None:
        """Add what another instance has seen, e.g. on another shard."""
        if other.width != self.width:
            raise InputError(f"cannot merge moments of widths {self.width} and {other.width}")
        self.count += other.count
        for name in self.sums:
            own: Tensor = getattr(self, name)
            own += getattr(other, name).to(own.device)

    def all_reduce(self, group: Any = None, device: torch.device | None = None) -> None:
        """Sum over all processes of a ``torch.distributed`` group, in place.

        Parameters
        ----------
        group
            All processes by default.
        device
            Where the group can sum; where the sums live by default.
        """
        count = torch.tensor(self.count, dtype=torch.int64)
        for own in (count, *(getattr(self, name) for name in self.sums)):
            there = own.to(device or self.sum.device)
            torch.distributed.all_reduce(there, group=group)
            own.copy_(there)
        self.count = int(count)

    def _check_seen(self) -> None:
        if self.count == 0:
            raise InputError("no samples were seen; update() with at least one batch first")

    @property
    def mean(self) -> Tensor:
        """(d,) mean."""
        self._check_seen()
        return self.sum / self.count

    def state_dict(self) -> dict[str, Tensor]:
        """Return plain tensors, fit for safetensors."""
        state = {name: getattr(self, name).clone() for name in self.sums}
        return {"count": torch.tensor(self.count), **state}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        if state["sum"].shape != self.sum.shape:
            raise InputError(
                f"the state is of width {state['sum'].numel()}, these moments are {self.width}"
            )
        self.count = int(state["count"])
        for name in self.sums:
            getattr(self, name).copy_(state[name])


class Moments(Sums):
    """Count, sum and second moment ``sum x x^T`` of vectors seen in batches, in float64.

    Sums do not depend on how the samples were cut into batches, up to float64 rounding.

    Parameters
    ----------
    width
        Length d of each vector.
    device
        Where the (d, d) sums live; the CPU by default. Batches are moved there.

    Examples
    --------
    >>> moments = Moments(2)
    >>> moments.update(torch.tensor([[1.0, 0.0], [3.0, 2.0]]))
    >>> moments.count, moments.mean.tolist(), moments.covariance.tolist()
    (2, [2.0, 1.0], [[1.0, 1.0], [1.0, 1.0]])
    """

    sums = ("sum", "second")

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        super().__init__(width, device)
        # Its lower triangle; above it, some of the sums are there and some are not.
        self.second = torch.zeros(width, width, dtype=torch.float64, device=device)

    def _add(self, rows: Tensor) -> None:
        for band in _bands(self.width):
            self.second[band, : band.stop].addmm_(rows[:, band].T, rows[:, : band.stop])

    def _move(self, by: Tensor) -> None:
        cross = torch.outer(self.sum - self.count / 2 * by, by)
        self.second -= cross + cross.T

    @property
    def second_moment(self) -> Tensor:
        """(d, d) uncentred second moment, divided by the count."""
        self._check_seen()
        return (self.second.tril() + self.second.tril(-1).T) / self.count

    @property
    def covariance(self) -> Tensor:
        """(d, d) covariance, divided by the count (not count - 1), symmetric."""
        return self.second_moment - torch.outer(self.mean, self.mean)


def _bands(width: int) -> list[slice]:
    """Rows to sum at a time, each with the columns up to its own: a third less than all of both.

    >>> _bands(10), len(_bands(384))
    ([slice(0, 10, None)], 4)
    """
    height = -(-width // 4) if width >= 256 else width
    return [slice(start, min(start + height, width)) for start in range(0, width, height)]
