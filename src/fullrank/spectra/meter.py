"""`SpectrumMeter`: the spectrum of samples seen in batches, in constant memory."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.core.moments import Moments, Sums
from fullrank.core.sketched_moments import SketchedMoments
from fullrank.spectra.spectrum import Spectrum
from fullrank.spectra.values import as_tensor

EXACT_TO = 4096
"""Width up to which the whole second moment is kept: 128 MiB of it."""
SKETCH = 512
"""Columns of the sketch that is kept of wider ones."""

# Eigenvalues below so many roundings of the largest are rounding themselves.
_ROUNDING = 16 * torch.finfo(torch.float64).eps


class SpectrumMeter:
    """Spectrum of a matrix ``(N, K)`` whose rows come in batches, whatever N.

    Keeps the ``(K, K)`` second moment in float64, so the result does not depend on how the rows
    were cut into batches or spread over processes. Its eigenvalues are the squares of the
    singular values, which come out to a relative 1e-8 where they are 1e-4 of the largest or more;
    below about 6e-8 of the largest they are lost, and counted as zero. Wider than ``exact_to`` it
    keeps a random sketch, ``2 K sketch`` numbers: the leading ``sketch`` values, none above the
    true one, and the bound of their error in :attr:`Spectrum.missed`.

    Parameters
    ----------
    center
        Subtract the mean row. That of the first batch goes at once: a large mean costs no digits.
    exact_to
        Width up to which the whole moment is kept.
    sketch
        Values found of wider ones.
    device
        Where the sums live; by default where the first batch is (the CPU for devices without
        float64).

    Examples
    --------
    >>> meter = SpectrumMeter()
    >>> for _ in range(3):
    ...     meter.update(torch.eye(5))
    >>> spectrum = meter.spectrum()
    >>> round(spectrum.effective_rank, 4), meter.count
    (5.0, 15)
    """

    def __init__(
        self,
        *,
        center: bool = False,
        exact_to: int = EXACT_TO,
        sketch: int = SKETCH,
        device: torch.device | str | None = None,
    ) -> None:
        if exact_to < 0 or sketch < 1:
            raise InputError(f"exact_to={exact_to}, sketch={sketch}; expected at least 0 and 1")
        self.center = center
        self.exact_to = exact_to
        self.sketch = sketch
        self.device = device
        self._sums: Sums | None = None
        # Taken off every sample where the mean goes anyway: about that mean.
        self._origin: Tensor | None = None

    @property
    def count(self) -> int:
        """Number of samples seen."""
        return 0 if self._sums is None else self._sums.count

    @property
    def width(self) -> int | None:
        """Length of a sample; None before the first."""
        return None if self._sums is None else self._sums.width

    def update(self, batch: Any, mask: Any = None) -> None:
        """Add samples ``(..., K)``; ``mask`` of the leading shape is False where to leave out.

        Raises
        ------
        InputError
            On a batch that is empty, of integers, of another width or not finite where it counts;
            the meter is then unchanged.
        """
        rows = as_tensor(batch, "a batch", finite=False)
        keep = None if mask is None else torch.as_tensor(mask)
        sums = self._sums or self._fresh(rows.shape[-1] if rows.ndim else 0, rows.device)
        origin = self._origin
        if self.center and rows.ndim and rows.shape[-1] == sums.width:
            origin = _mean(rows, keep, sums.sum) if origin is None else origin
            rows = rows if origin is None else rows.to(origin) - origin
        sums.update(rows, keep)
        self._sums, self._origin = sums, origin

    def spectrum(self) -> Spectrum:
        """Spectrum of everything seen: ``min(N, K)`` values, or as many as the sketch has.

        Raises
        ------
        InputError
            When nothing was seen, or squares of what was seen leave the range of float64.

        Warns
        -----
        UserWarning
            When there were fewer samples than dimensions.
        """
        if self._sums is not None and 0 < self.count < self._sums.width:
            warnings.warn(few_samples(self.count, self._sums.width), stacklevel=2)
        return self._spectrum()

    def _spectrum(self) -> Spectrum:
        sums = self._sums
        if sums is None or not sums.count:
            raise InputError("no samples were seen; update() with at least one batch first")
        most = min(sums.count, sums.width)
        if isinstance(sums, SketchedMoments):
            values, missed = sums.eigenvalues(self.center)
            _check_range(sums, float(sums.trace))
            return Spectrum(values[:most].sqrt(), missed=missed if len(values) < most else 0.0)
        assert isinstance(sums, Moments)
        _check_range(sums, float(sums.second.diagonal().sum()))
        second = sums.covariance if self.center else sums.second_moment
        values = torch.linalg.eigvalsh(second).flip(0)[:most]
        # Centring rounds at the size of what it takes away.
        scale = values[0] + (sums.mean.square().sum() if self.center else 0.0)
        values = torch.where(values > _ROUNDING * scale, values, 0.0)
        return Spectrum((values * sums.count).sqrt())

    def _move_to(self, origin: Tensor) -> None:
        """Have the sums be those of samples minus this vector."""
        if self._sums is not None:
            origin = origin.to(self._sums.sum)
            self._sums.move(origin if self._origin is None else origin - self._origin)
        self._origin = origin.clone()

    def reset(self) -> None:
        """Forget everything."""
        self._sums = self._origin = None

    def merge(self, other: SpectrumMeter) -> None:
        """Add what another meter has seen, e.g. on another shard."""
        if other._sums is None:
            return
        if self._sums is None:
            self._sums = self._fresh(other._sums.width, other._sums.sum.device)
        if self._sums.width != other._sums.width or not (self.center or other.center):
            self._sums.merge(other._sums)
            return
        # Theirs are merged from a copy, about the same origin; a meter that does not centre has 0.
        theirs = copy.deepcopy(other)
        zero = torch.zeros_like(self._sums.sum)
        if self.center and self._origin is None:
            self._move_to(zero if other._origin is None else other._origin)
        theirs._move_to(zero if self._origin is None else self._origin)
        assert theirs._sums is not None
        self._sums.merge(theirs._sums)

    def sync(self, process_group: Any = None) -> None:
        """Sum over all processes of a ``torch.distributed`` group, in place.

        Every process must call it. One that saw nothing takes part too; nothing happens where no
        process saw anything, or outside ``torch.distributed``.

        Raises
        ------
        InputError
            When widths differ.
        """
        distributed = torch.distributed
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        device = self._where_summed(process_group)
        own = 0 if self._sums is None else self._sums.width
        # The largest width and the largest negated width tell all processes what to expect.
        bounds = torch.tensor([own or -1, -own if own else -(2**31)], device=device)
        distributed.all_reduce(bounds, op=distributed.ReduceOp.MAX, group=process_group)
        widest, narrowest = int(bounds[0]), -int(bounds[1])
        if widest < 1:
            return
        if narrowest != widest:
            raise InputError(f"processes saw samples of widths {narrowest} and {widest}")
        if self._sums is None:
            self._sums = self._fresh(widest, device)
        if self.center:
            self._move_to(self._shared_origin(process_group, device))
        self._sums.all_reduce(process_group, device)

    def _shared_origin(self, process_group: Any, device: torch.device) -> Tensor:
        """Mean of the processes' origins, each as often as it has samples."""
        assert self._sums is not None
        origin = torch.zeros_like(self._sums.sum) if self._origin is None else self._origin
        weighted = torch.cat([origin, origin.new_ones(1)]).to(device) * self.count
        torch.distributed.all_reduce(weighted, group=process_group)
        return weighted[:-1] / weighted[-1].clamp_min(1)

    def state_dict(self) -> dict[str, Tensor]:
        """Return plain tensors, fit for safetensors; empty when nothing was seen."""
        if self._sums is None:
            return {}
        origin = {} if self._origin is None else {"origin": self._origin.clone()}
        return self._sums.state_dict() | origin

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises
        ------
        InputError
            When it is that of a meter that sketches otherwise.
        """
        if not state:
            self.reset()
            return
        sums = self._fresh(state["sum"].numel(), torch.device("cpu"))
        if set(state) - {"origin"} != {"count", *sums.sums}:
            raise InputError(
                "the state is of a meter with other exact_to or sketch: they decide what is kept"
            )
        if "origin" in state and not self.center:
            raise InputError("the state is of a meter that centres, and this one does not")
        sums.load_state_dict(state)
        self._sums = sums
        origin = state.get("origin")
        self._origin = None if origin is None else origin.to(sums.sum, copy=True)

    def _fresh(self, width: int, device: torch.device) -> Sums:
        where = self.device or ("cpu" if device.type == "mps" else device)
        if width <= self.exact_to:
            return Moments(width, where)
        return SketchedMoments(width, min(self.sketch, width), where)

    def _where_summed(self, process_group: Any) -> torch.device:
        """Where the group can sum: the sums' own device, if there is a backend for it."""
        where = torch.device(self.device or "cpu") if self._sums is None else self._sums.sum.device
        # NCCL, or one backend for each device: "cpu:gloo,cuda:nccl".
        backends = str(torch.distributed.get_backend_config(process_group))
        served = [part.partition(":")[0] for part in backends.split(",")]
        if where.type in served or "cuda" not in served:
            return where
        return torch.device("cuda", torch.cuda.current_device())


def _mean(rows: Tensor, keep: Tensor | None, like: Tensor) -> Tensor | None:
    """Mean of the rows that count, as ``like``; None where none does."""
    flat = rows.reshape(-1, rows.shape[-1])
    if keep is not None and keep.shape == rows.shape[:-1]:
        flat = flat[keep.reshape(-1).to(rows.device, torch.bool)]
    return flat.to(like).mean(0) if len(flat) else None


def few_samples(count: int, width: int) -> str:
    """What to say of fewer samples than dimensions."""
    return (
        f"{count} samples of width {width}: their spectrum has at most {count} values that are "
        "not zero, and its ranks are those of the sample, which grow with it"
    )


def _check_range(sums: Sums, energy: float) -> None:
    if not energy < float("inf") or (energy == 0.0 and bool(sums.sum.any())):
        raise InputError(
            "squares of what was seen leave the range of float64: scale the samples first"
        )
