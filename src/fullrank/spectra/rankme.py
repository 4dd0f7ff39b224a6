"""RankMe: the effective rank of embeddings, a quality score that needs no labels.

Garrido, Balestriero, Najman and LeCun, ICML 2023, arXiv 2210.02885, equation 2. High rank is
necessary for good embeddings, not sufficient: noise raises it. Compare runs of one method, at one
number of samples, several times the width.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.spectra.measures import effective_rank
from fullrank.spectra.meter import SpectrumMeter
from fullrank.spectra.values import as_tensor, singular_values

EPS = 1e-7
"""Added to every share of the singular values (paper, section 3.1: float32 rounding)."""


def _score(values: Tensor, samples: int, width: int, eps: float, center: bool) -> float:
    if not float(values.sum()) > 0:
        alike = "the same" if center else "zero"
        raise InputError(f"all embeddings are {alike}: there is no rank to speak of")
    if samples < 2 * width:
        warnings.warn(
            f"{samples} samples of width {width}: RankMe still grows with the number of samples "
            f"below a few times the width; use at least {2 * width}, and the same number for all "
            "that is compared",
            stacklevel=3,
        )
    return float(effective_rank(values, input="singular_values", eps=eps))


@torch.no_grad()
def rankme(embeddings: Any, eps: float = EPS, center: bool = False) -> float:
    """RankMe of an embedding matrix: exponential of the entropy of its singular values.

    Parameters
    ----------
    embeddings
        ``(N, K)`` array or tensor, one row a sample; neither centred nor normalised by it. Work
        is done in float64.
    eps
        Added to every share ``sigma_k / sum(sigma)``, which are not renormalised (1e-7, paper).
    center
        Subtract the mean first; not part of the paper's definition.

    Returns
    -------
    float
        In ``[1, min(N, K)]``, up to about ``16 eps min(N, K)``.

    Raises
    ------
    InputError
        On input that is not 2-D, empty, of integers, not finite, or all zero.

    Warns
    -----
    UserWarning
        When there are fewer than 2 K samples.

    Examples
    --------
    >>> import numpy as np
    >>> round(rankme(np.tile(np.eye(4), (10, 1))), 4)
    4.0
    """
    Z = as_tensor(embeddings, "the embedding matrix")
    if Z.ndim != 2:
        raise InputError(
            f"embeddings of shape {tuple(Z.shape)}; expected (samples, width): pool or flatten "
            "token tensors first"
        )
    return _score(singular_values(Z, center=center), len(Z), Z.shape[1], eps, center)


class RankMeMeter(SpectrumMeter):
    """RankMe of embeddings seen in batches, in constant memory.

    Keeps the ``(K, K)`` second moment in float64, so the result does not depend on how the
    samples were cut into batches; it is not the average of the batches' scores. What the
    :class:`~fullrank.spectra.SpectrumMeter` under it loses, singular values below 6e-8 of the
    largest, is below ``eps``.

    Parameters
    ----------
    eps, center
        As for :func:`rankme`.
    device
        Where the moment lives; the CPU by default.

    Examples
    --------
    >>> import torch
    >>> meter = RankMeMeter()
    >>> for _ in range(3):
    ...     meter.update(torch.eye(5))
    >>> round(meter.compute(), 4)
    5.0
    """

    def __init__(
        self, eps: float = EPS, center: bool = False, device: torch.device | str = "cpu"
    ) -> None:
        # Never sketched: a sketch would cut the score off.
        super().__init__(center=center, exact_to=sys.maxsize, device=device)
        self.eps = eps

    def update(self, batch: Any, mask: Any = None) -> None:
        """Add a batch ``(n, K)``; ``mask`` ``(n,)`` is False for rows to leave out.

        Raises
        ------
        InputError
            On a batch that is not 2-D, empty, of integers, of another width or not finite; the
            meter is then unchanged.
        """
        Z = as_tensor(batch, "a batch of embeddings", finite=False)
        if Z.ndim != 2:
            raise InputError(f"a batch of shape {tuple(Z.shape)}; expected (samples, width)")
        super().update(Z, mask)

    def compute(self) -> float:
        """RankMe of everything seen.

        Raises
        ------
        InputError
            When nothing was seen, or only zeros.
        """
        if self.width is None or not self.count:
            raise InputError("no embeddings were seen; update() with at least one batch first")
        values = torch.from_numpy(self._spectrum().values.copy())
        return _score(values, self.count, self.width, self.eps, self.center)

    def sync(self, process_group: Any = None) -> None:
        """Sum over all processes of a ``torch.distributed`` group, in place.

        Every process must call it. One that saw nothing takes part too.

        Raises
        ------
        InputError
            When no process has seen anything, or when widths differ.
        """
        super().sync(process_group)
        distributed = torch.distributed
        running = distributed.is_available() and distributed.is_initialized()
        if running and self.width is None:
            raise InputError("no process has seen embeddings; update() first")


def select_by_rankme(
    runs: Mapping[str, Any],
    tie_rtol: float = 0.01,
    prefer: Literal["min", "max"] = "min",
    *,
    eps: float = EPS,
    center: bool = False,
) -> str:
    """Pick the run with the highest RankMe; among ties, an end of the varied setting.

    Parameters
    ----------
    runs
        Name of the run -> its embeddings ``(N, K)``, or its RankMe as a number. Where names read
        as numbers (the values of the hyperparameter), they are ordered so; else the order of the
        mapping is that of the setting.
    tie_rtol
        Scores within this relative distance of the best count as ties (1 %).
    prefer
        Which end of the setting wins among ties (paper, figure 4: the extreme value that still
        reaches the top).
    eps, center
        As for :func:`rankme`.

    Raises
    ------
    InputError
        When there are no runs, a score is not finite, or embeddings differ in shape: RankMe grows
        with both of its sides.

    Examples
    --------
    >>> select_by_rankme({"1e-2": 40.1, "1e-3": 40.0, "1e-4": 21.7})
    '1e-3'
    """
    if not runs:
        raise InputError("there are no runs to select from")
    if prefer not in ("min", "max"):
        raise InputError(f"prefer={prefer!r}; it is 'min' or 'max'")
    shapes = {
        name: tuple(as_tensor(run, f"run {name!r}").shape)
        for name, run in runs.items()
        if np.ndim(run)
    }
    if len(set(shapes.values())) > 1:
        raise InputError(f"runs are comparable at one shape of embeddings; these have {shapes}")
    scores = {
        name: rankme(run, eps, center) if np.ndim(run) else float(run) for name, run in runs.items()
    }
    for name, score in scores.items():
        if not math.isfinite(score):
            raise InputError(f"run {name!r} has a RankMe of {score}: leave it out")
    best = max(scores.values())
    tied = [name for name in _in_order(scores) if scores[name] >= best * (1 - tie_rtol)]
    return tied[0] if prefer == "min" else tied[-1]


def _in_order(names: Mapping[str, Any]) -> list[str]:
    try:
        return sorted(names, key=float)
    except ValueError:
        return list(names)
