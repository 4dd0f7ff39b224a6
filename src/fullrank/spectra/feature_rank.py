"""`feature_rank`: how many directions a network's features use, as studies of critics count it."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch

from fullrank.core.errors import InputError
from fullrank.spectra.measures import effective_rank
from fullrank.spectra.values import as_tensor

Kind = Literal["numerical", "effective", "srank"]


def feature_rank(
    Phi: Any, eps: float = 0.01, kind: Kind = "numerical", delta: float = 0.01
) -> float:
    """Rank of features by one of three definitions.

    Parameters
    ----------
    Phi
        ``(N, d)`` array or tensor, one row a sample, as they are (not centred).
    eps
        Threshold of ``"numerical"``: 0.01 (BEER and Lyle et al. 2022).
    kind
        ``"numerical"``: singular values of ``Phi / sqrt(N)`` above ``eps``.
        ``"effective"``: the exponential of the entropy of the singular values.
        ``"srank"``: how many of the largest singular values hold ``1 - delta`` of their sum
        (Kumar et al. 2021).
    delta
        Of ``"srank"``, in [0, 1): 0.01.

    Raises
    ------
    InputError
        On other shapes, an unknown kind, ``delta`` out of range, or values that are not finite.

    Examples
    --------
    >>> features = torch.diag(torch.tensor([4.0, 2.0, 0.001, 0.0]))
    >>> feature_rank(features), feature_rank(features, kind="srank")
    (2.0, 2.0)
    """
    F = as_tensor(Phi, "the features")
    if F.ndim != 2:
        raise InputError(f"features of shape {tuple(F.shape)}; expected (samples, width)")
    if kind not in get_args(Kind):
        raise InputError(f"kind={kind!r}; it is one of {', '.join(get_args(Kind))}")
    if not 0 <= delta < 1:
        raise InputError(f"delta={delta}; it is a share in [0, 1)")
    if kind == "effective":
        return float(effective_rank(F))
    values = torch.linalg.svdvals(F.double())
    if kind == "numerical":
        return float((values / len(F) ** 0.5 > eps).sum())
    total = values.sum()
    if total == 0:
        return 0.0
    # As many as hold less than the share, and one more; rounding may keep all of them below it.
    return float(min(int((values.cumsum(0) < (1 - delta) * total).sum()) + 1, len(values)))
