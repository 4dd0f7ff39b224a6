"""`feature_rank`: how many directions a network's features use, as studies of critics count it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.spectra.measures import effective_rank

Kind = Literal["numerical", "effective", "srank"]


def feature_rank(
    features: Tensor, eps: float = 0.01, kind: Kind = "numerical", delta: float = 0.01
) -> float:
    """Rank of features by one of three definitions.

    Parameters
    ----------
    features
        ``(N, d)``, one row a sample, as they are (not centred).
    eps
        Threshold of ``"numerical"``: 0.01 (BEER and Lyle et al. 2022).
    kind
        ``"numerical"``: singular values of ``features / sqrt(N)`` above ``eps``.
        ``"effective"``: the exponential of the entropy of the singular values.
        ``"srank"``: how many of the largest singular values hold ``1 - delta`` of their sum
        (Kumar et al. 2021).
    delta
        Of ``"srank"``: 0.01.

    Raises
    ------
    InputError
        On other shapes, an unknown kind, or values that are not finite.

    Examples
    --------
    >>> features = torch.diag(torch.tensor([4.0, 2.0, 0.001, 0.0]))
    >>> feature_rank(features), feature_rank(features, kind="srank")
    (2.0, 2.0)
    """
    if features.ndim != 2 or 0 in features.shape or not features.is_floating_point():
        raise InputError(
            f"features of shape {tuple(features.shape)} and {features.dtype}; expected floating "
            "point of (samples, width)"
        )
    if kind == "effective":
        return float(effective_rank(features))
    if kind not in ("numerical", "srank"):
        raise InputError(f"kind={kind!r}; it is 'numerical', 'effective' or 'srank'")
    if not torch.isfinite(features).all():
        raise InputError("the features hold NaN or infinite values")
    values = torch.linalg.svdvals(features.detach().double())
    if kind == "numerical":
        return float((values / len(features) ** 0.5 > eps).sum())
    total = values.sum()
    if total == 0:
        return 0.0
    return float((values.cumsum(0) < (1 - delta) * total).sum() + 1)
