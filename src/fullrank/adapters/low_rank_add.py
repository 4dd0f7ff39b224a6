"""Adding a low-rank update to a layer's output in one pass over it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812


def add_low_rank(h: Tensor, z: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return ``h + scale * z B^T``, in the type of ``h``.

    Parameters
    ----------
    h
        The layer's output ``(..., out)``.
    z
        What the down-projection made ``(..., r)``.
    B
        Up-projection ``(out, r)``.
    scale
        Of the update.

    Examples
    --------
    >>> add_low_rank(torch.ones(1, 2), torch.ones(1, 3), torch.ones(2, 3), 0.5)
    tensor([[2.5000, 2.5000]])
    """
    if torch.is_autocast_enabled(h.device.type) or h.dtype == z.dtype == B.dtype:
        # One product that starts from h: the update is never written by itself, nor scaled, and
        # the gradient of h is that of the sum, without a copy.
        rows = torch.addmm(
            h.reshape(-1, h.shape[-1]), z.reshape(-1, z.shape[-1]), B.t(), alpha=scale
        )
        return rows.view(h.shape).to(h.dtype)
    wide = torch.promote_types(torch.promote_types(z.dtype, B.dtype), h.dtype)
    return (h + scale * F.linear(z.to(wide), B.to(wide))).to(h.dtype)
