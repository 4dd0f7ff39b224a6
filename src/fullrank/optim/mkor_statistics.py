"""Rank-1 statistics of a batch for MKOR: means of clipped rows, also over convolutions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class Statistics:
    """Rank-1 statistics of the batches since the last step."""

    a: Tensor | None = None
    g: Tensor | None = None
    seen: int = 0

    def add(self, a: Tensor, g: Tensor) -> None:
        """Take in one pass through the layer."""
        self.a = a if self.a is None else self.a + a
        self.g = g if self.g is None else self.g + g
        self.seen += 1

    def clear(self) -> None:
        """Forget them."""
        self.a, self.g, self.seen = None, None, 0


def clipped_sum(
    rows: Tensor, bound: float | Tensor, mask: Tensor | None
) -> tuple[Tensor, int | Tensor]:
    """Sum over the rows (of a mask) of elements clipped to ``+-bound``, and how many rows.

    >>> clipped_sum(torch.tensor([[1.0, 5.0], [2.0, -9.0]]), 3.0, None)
    (tensor([3., 0.]), 2)
    """
    if isinstance(bound, Tensor):
        bound = bound.to(rows.device, rows.dtype)
        rows = torch.minimum(torch.maximum(rows, -bound), bound)
    else:
        rows = rows.clamp(-bound, bound)
    if mask is None:
        return rows.sum(0), len(rows)
    chosen = mask.reshape(-1).to(rows.device, rows.dtype)
    return chosen @ rows, chosen.sum()


def mean_patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Mean over output positions of the unfolded patches of each image.

    A strided window of the padded input for each place in the kernel; nothing is unfolded.

    Parameters
    ----------
    x
        ``(N, C, H, W)`` or ``(C, H, W)``.
    conv
        Its kernel, stride, padding and dilation count.

    Returns
    -------
    Tensor
        ``(N, C * kh * kw)``, ordered as :class:`torch.nn.Unfold` orders.

    Examples
    --------
    >>> conv, x = nn.Conv2d(2, 3, 3, stride=2, padding=1), torch.randn(4, 2, 7, 6)
    >>> unfolded = nn.functional.unfold(x, 3, stride=2, padding=1).mean(2)
    >>> torch.allclose(mean_patches(x, conv), unfolded, atol=1e-6)
    True
    """
    x = x if x.dim() == 4 else x.unsqueeze(0)
    x = _pad(x, conv)
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    high = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    wide = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    found = []
    for i in range(kh):
        columns = x[:, :, i * dh : i * dh + sh * (high - 1) + 1 : sh].sum(2)
        for j in range(kw):
            found.append(columns[..., j * dw : j * dw + sw * (wide - 1) + 1 : sw].sum(-1))
    return torch.stack(found, -1).flatten(1) / (high * wide)


def _pad(x: Tensor, conv: nn.Conv2d) -> Tensor:
    if conv.padding == "valid":
        return x
    if conv.padding == "same":
        total = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        top, left = (t // 2 for t in total)
        sides = [left, total[1] - left, top, total[0] - top]
    else:
        top, left = (int(p) for p in conv.padding)
        sides = [left, left, top, top]
    if not any(sides):
        return x
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return nn.functional.pad(x, sides, mode=mode)
