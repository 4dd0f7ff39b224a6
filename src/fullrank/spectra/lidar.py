"""LiDAR: the effective rank of what tells samples apart from their own views.

Thilak et al., "LiDAR: sensing linear probing performance in joint embedding SSL architectures",
2023, arXiv 2312.04000. RankMe cannot tell information from noise; here what differs between
augmented views of one sample counts as noise, and directions are measured in units of it.
"""

from __future__ import annotations

from typing import Any

import torch

from fullrank.core.errors import InputError
from fullrank.spectra.values import as_tensor, to_double

DELTA = 1e-4
"""Added to the within-sample covariance's diagonal (paper, section 4)."""
EPS = 1e-8
"""Added to every eigenvalue (the peers' code)."""


@torch.no_grad()
def lidar(embeddings: Any, delta: float = DELTA, eps: float = EPS) -> float:
    """Effective rank of the linear discriminant matrix of samples and their views.

    ``exp(-sum p log p)`` with ``p`` the shares of the eigenvalues of
    ``Sw^(-1/2) Sb Sw^(-1/2)``: Sb the covariance of the samples' means, Sw that of views around
    their sample's mean, and ``delta`` on its diagonal.

    Parameters
    ----------
    embeddings
        ``(samples, views, width)``: n clean samples, q augmented views of each (the paper takes
        1,000 and 50). Work is done in float64.
    delta
        1e-4 (paper).
    eps
        Added to every eigenvalue before shares are taken (1e-8).

    Returns
    -------
    float
        In ``[1, min(samples - 1, width)]``, up to what ``eps`` adds.

    Raises
    ------
    InputError
        On input that is not 3-D, of fewer than two samples or views, of integers, not finite, or
        where all samples have the same mean; on a delta that is not positive.

    Examples
    --------
    >>> generator = torch.Generator().manual_seed(0)
    >>> means = torch.randn(200, 1, 4, generator=generator)
    >>> views = means + 0.1 * torch.randn(200, 10, 4, generator=generator)
    >>> 3.8 < lidar(views) < 4.0
    True
    """
    Z = as_tensor(embeddings, "the embeddings")
    if Z.ndim != 3 or Z.shape[0] < 2 or Z.shape[1] < 2:
        raise InputError(
            f"embeddings of shape {tuple(Z.shape)}; expected (samples, views, width) with at "
            "least two samples and two views of each"
        )
    if not delta > 0 or not eps >= 0:
        raise InputError(f"delta={delta}, eps={eps}; delta is positive, eps not negative")
    Z = to_double(Z)
    samples, views, width = Z.shape
    means = Z.mean(1)
    centred, rest = means - means.mean(0), (Z - means[:, None]).flatten(0, 1)
    within = rest.T @ rest / (samples * (views - 1))
    within.diagonal().add_(delta)
    # The eigenvalues of L^-1 Sb L^-T with Sw = L L^T are those of Sw^(-1/2) Sb Sw^(-1/2).
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(within), centred.T / (samples - 1) ** 0.5, upper=False
    )
    values = torch.linalg.svdvals(whitened).square()
    if not float(values.sum()) > 0:
        raise InputError("all samples have the same mean: nothing tells them apart")
    values = torch.nn.functional.pad(values, (0, width - len(values))) + eps
    p = values / values.sum()
    return float(torch.exp(-torch.special.xlogy(p, p).sum()))
