"""From a convolution to its two factors, by the SVD of its weight."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fullrank.compress.layers_conv import LowRankConv
from fullrank.compress.matrices_conv import matricise_conv
from fullrank.compress.solvers import Balance
from fullrank.compress.stacked_svd import Components, components
from fullrank.core.errors import InputError


@torch.no_grad()
def split_conv(
    module: nn.Module, rank: int, scheme: str = "channel", balance: Balance | None = None
) -> LowRankConv:
    """Split a convolution into two.

    Parameters
    ----------
    module
        ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``; it is not changed.
    rank, scheme
        See :class:`~fullrank.compress.layers_conv.LowRankConv`.
    balance
        Where each component's size goes: ``"sqrt"`` on both factors alike, ``"first"`` (or its
        other name, ``"orthonormal_second"``) or ``"second"``. By default ``"second"`` spatially
        and ``"sqrt"`` else, as in TRP's code.

    Raises
    ------
    InputError
        On a rank or scheme out of range, or a weight that is not finite.

    Examples
    --------
    >>> conv = nn.Conv2d(4, 8, 3, padding=1)
    >>> layer, x = split_conv(conv, rank=8), torch.randn(1, 4, 5, 5)
    >>> torch.allclose(layer(x), conv(x), atol=1e-5)
    True
    """
    use = balance or ("second" if scheme == "spatial" else "sqrt")
    if use == "orthonormal_second":
        use = "first"
    if use not in ("sqrt", "first", "second"):
        raise InputError(f"balance {use!r} of a convolution; it is 'sqrt', 'first' or 'second'")
    layer = LowRankConv.like(module, rank, scheme)
    found = components(matricise_conv(module, scheme).matrix)
    # Channel-wise the matrix has the outputs on its left, where the second convolution is.
    second_left = scheme == "channel"
    left_share = {"sqrt": 0.5, "second": float(second_left), "first": float(not second_left)}[use]
    left, right = _shared_out(found, rank, left_share)
    first, second = (right, left.mT) if second_left else (left.mT, right)
    layer.first.copy_(_first(layer, first))
    layer.second.copy_(_second(layer, second))
    if layer.bias is not None:
        layer.bias.copy_(module.get_parameter("bias"))
    squares = found.sizes.square()
    layer.method = "svd"
    layer.error = float(squares[..., rank:].sum() / squares.sum().clamp_min(1e-300))
    return layer


@torch.no_grad()
def write_factors(layer: LowRankConv, first: Tensor, second: Tensor) -> None:
    """Write a matrix's two factors into the kernels of a channel-wise layer.

    Parameters
    ----------
    layer
        Of scheme ``"channel"``; changed in place.
    first, second
        ``(r, C k)`` and ``(N, r)``; with g groups stacks of g, of ``C k / g`` and ``N / g``.
    """
    layer.first.copy_(_first(layer, first))
    layer.second.copy_(_second(layer, second.mT))


def _shared_out(found: Components, rank: int, left_share: float) -> tuple[Tensor, Tensor]:
    """Leading factors, each component's size shared out between them."""
    left, right = found.left[..., :rank], found.right[..., :rank, :]
    a, b = left.norm(dim=-2), right.norm(dim=-1)
    live = (a > 0) & (b > 0)
    scale = torch.where(live, (a * b).pow(left_share) / a, 1.0)
    return left * scale[..., None, :], right / scale[..., :, None]


def _first(layer: LowRankConv, rows: Tensor) -> Tensor:
    """``(..., r, inputs)`` components as the first kernel: each row is a filter."""
    if layer.scheme == "spatial":
        C, height = layer.in_channels, layer.kernel_size[0]
        return rows.reshape(layer.rank, C, height, 1)
    return rows.reshape(layer.first.shape)


def _second(layer: LowRankConv, rows: Tensor) -> Tensor:
    """``(..., r, outputs)`` components as the second kernel."""
    if layer.scheme == "spatial":
        N, width = layer.out_channels, layer.kernel_size[1]
        return rows.reshape(layer.rank, N, 1, width).transpose(0, 1)
    if layer.scheme == "channel":
        return rows.mT.reshape(layer.second.shape)
    return rows.reshape(layer.second.shape)
