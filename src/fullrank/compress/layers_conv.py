"""`LowRankConv1d`, `LowRankConv2d`, `LowRankConv3d`: a convolution as two cheaper ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.compress.layers_weight import product_weight
from fullrank.compress.matrices_conv import CONVOLUTIONS, matricise_conv
from fullrank.core.errors import InputError

Sizes = int | Sequence[int]


class LowRankConv(nn.Module):
    """Two convolutions in the place of one, without anything between them.

    What they are depends on the scheme, for C channels in, N out, and rank r:

    - ``"channel"``: C to r with the whole kernel, then r to N with 1x1; ``r (C k + N)`` numbers,
      k the product of the kernel's sizes. With groups both are grouped.
    - ``"spatial"``: C to r with ``(kh, 1)``, then r to N with ``(1, kw)``; ``r (C kh + N kw)``.
    - ``"decouple"``: C to N r with 1x1, then each filter's own r to 1 with the whole kernel;
      ``r N (C + k)``.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode
        As in ``nn.Conv2d``.
    rank
        Rank r, from 1 to that of the matrix the weight is read as (see
        :func:`~fullrank.compress.matrices_conv.matricise_conv`).
    scheme
        See above.
    device, dtype
        Of the parameters.

    Attributes
    ----------
    first, second : Parameter
        The two kernels.
    bias : Parameter or None
        ``(N,)``, after the second.
    method : str
        How the factors were made.
    error : float or None
        Their relative squared error at that time.

    Raises
    ------
    InputError
        On a rank out of range, or a scheme that does not go with these sizes.

    Examples
    --------
    >>> layer = LowRankConv2d(8, 16, 3, rank=4, stride=2, padding=1)
    >>> layer(torch.zeros(2, 8, 9, 9)).shape, layer.merged_weight().shape
    (torch.Size([2, 16, 5, 5]), torch.Size([16, 8, 3, 3]))
    """

    dense: ClassVar[type[nn.Module]]
    bias: Tensor | None
    method: str = ""
    error: float | None = None
    bias_added: bool = False

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sizes,
        rank: int,
        stride: Sizes = 1,
        padding: Sizes | str = 0,
        dilation: Sizes = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        *,
        scheme: str = "channel",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # The dense layer, without its numbers: it checks the arguments and knows what they mean.
        shape: Any = self.dense(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device="meta",
        )
        stack = matricise_conv(shape, scheme).matrix.shape
        if not 1 <= rank <= min(stack[-2:]):
            raise InputError(
                f"rank {rank} for a convolution read as {stack[-2]} x {stack[-1]}; it must lie in "
                f"[1, {min(stack[-2:])}]"
            )
        self.scheme = scheme
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = shape.kernel_size, shape.stride
        self.padding, self.dilation = shape.padding, shape.dilation
        self.padding_mode = padding_mode
        for name, size in zip(("first", "second"), self._factor_shapes(rank), strict=True):
            self.register_parameter(
                name, nn.Parameter(torch.empty(size, device=device, dtype=dtype))
            )
        if bias:
            self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    first: nn.Parameter
    second: nn.Parameter

    @classmethod
    def like(
        cls, module: nn.Module, rank: int, scheme: str, bias: bool | None = None
    ) -> LowRankConv:
        """Return an empty layer that stands for a convolution, dense or factorised."""
        if not isinstance(module, (*CONVOLUTIONS, LowRankConv)):
            raise InputError(f"a {type(module).__name__} is no convolution that can be factorised")
        numbers = next(module.parameters())
        # Asked of a class for one number of dimensions, it is of that class.
        kind = cls if hasattr(cls, "dense") else _CLASSES[len(module.kernel_size)]
        layer = kind(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            rank,
            module.stride,
            module.padding,
            module.dilation,
            module.groups,
            module.bias is not None if bias is None else bias,
            module.padding_mode,
            scheme=scheme,
            device=numbers.device,
            dtype=numbers.dtype,
        )
        return layer.requires_grad_(numbers.requires_grad).train(module.training)

    def _factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        C, N, kernel = self.in_channels // self.groups, self.out_channels, self.kernel_size
        ones = (1,) * len(kernel)
        if self.scheme == "channel":
            return (self.groups * rank, C, *kernel), (N, rank, *ones)
        if self.scheme == "spatial":
            return (rank, C, kernel[0], 1), (N, rank, 1, kernel[1])
        return (N * rank, C, *ones), (N, rank, *kernel)

    def reset_parameters(self) -> None:
        """Draw new factors; their product has the variance of a dense convolution's weight."""
        if self.first.is_meta:
            return
        fan_in = self.in_channels // self.groups * math.prod(self.kernel_size)
        # Each entry of the weight is a sum of r products; U(-b, b) has the variance b^2 / 3.
        wide = 1 / math.sqrt(fan_in)
        nn.init.uniform_(self.first, -wide, wide)
        both = math.sqrt(3 / self.rank)
        nn.init.uniform_(self.second, -both, both)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -wide, wide)

    @property
    def rank(self) -> int:
        """Channels between the two convolutions, of each group or filter."""
        return self.second.shape[1]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``(N, C / groups, *kernel)`` of the dense weight."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def weight(self) -> Tensor:
        """The dense weight these factors stand for, as ``LowRankLinear.weight``."""
        return product_weight(self.merged_weight, self.weight_shape, (self.first, self.second))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., C, *size)`` to ``(..., N, *size out)``."""
        return self.run(x, self.first, self.second)

    def run(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Apply the layer with other factors of its kind, e.g. a prefix of its own."""
        whole = self._windows(self.stride, self.dilation)
        point = [(1, 1, (0, 0))] * len(self.kernel_size)
        if self.scheme == "spatial":
            down, across = [whole[0], point[1]], [point[0], whole[1]]
            return self._convolve(
                self._convolve(x, first, None, down, 1), second, self.bias, across, 1
            )
        if self.scheme == "decouple":
            thin = self._convolve(x, first, None, point, 1)
            return self._convolve(thin, second, self.bias, whole, self.out_channels)
        thin = self._convolve(x, first, None, whole, self.groups)
        return self._convolve(thin, second, self.bias, point, self.groups)

    def _windows(
        self, stride: Sequence[int], dilation: Sequence[int]
    ) -> list[tuple[int, int, tuple[int, int]]]:
        """Stride, dilation and padding on both sides, along each dimension."""
        pads: list[tuple[int, int]] = []
        for i, (size, gap) in enumerate(zip(self.kernel_size, dilation, strict=True)):
            if self.padding == "same":
                total = gap * (size - 1)
                pads.append((total // 2, total - total // 2))
            else:
                pad = 0 if isinstance(self.padding, str) else self.padding[i]
                pads.append((pad, pad))
        return list(zip(stride, dilation, pads, strict=True))

    def _convolve(
        self,
        x: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        windows: Sequence[tuple[int, int, tuple[int, int]]],
        groups: int,
    ) -> Tensor:
        strides, gaps, pads = zip(*windows, strict=True)
        even = all(left == right for left, right in pads)
        padding: Sequence[int] = [left for left, _ in pads] if even else [0] * len(pads)
        if self.padding_mode != "zeros" or not even:
            # What a mode copies into the margin of one dimension commutes with a convolution
            # along another, so that padding each where it is convolved is exact.
            flat = [side for pad in reversed(pads) for side in pad]
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = functional.pad(x, flat, mode) if any(flat) else x
            padding = [0] * len(pads)
        run: Any = getattr(functional, f"conv{len(pads)}d")
        out: Tensor = run(x, kernel, bias, strides, padding, gaps, groups)
        return out

    def merged_weight(self) -> Tensor:
        """The dense weight, ``(N, C / groups, *kernel)``."""
        return self.merge(self.first, self.second)

    def merge(self, first: Tensor, second: Tensor) -> Tensor:
        """The dense weight of other factors of this layer's kind."""
        N, rank, C = self.out_channels, second.shape[1], self.in_channels // self.groups
        if self.scheme == "spatial":
            # (r, C, kh) and (N, r, kw)
            return torch.einsum("rci,nrj->ncij", first[..., 0], second[:, :, 0])
        if self.scheme == "decouple":
            per_filter = first.reshape(N, rank, C)
            return torch.einsum("nrc,nrk->nck", per_filter, second.flatten(2)).reshape(
                N, C, *self.kernel_size
            )
        g = self.groups
        product = second.reshape(g, N // g, rank) @ first.reshape(g, rank, -1)
        return product.reshape(N, C, *self.kernel_size)

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return the dense convolution that computes the same up to rounding."""
        dense: Any = self.dense(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias is not None,
            self.padding_mode,
            device=self.first.device,
            dtype=self.first.dtype,
        )
        wide = torch.float64 if self.first.device.type != "mps" else torch.float32
        dense.weight.copy_(self.merge(self.first.to(wide), self.second.to(wide)))
        dense.requires_grad_(self.first.requires_grad)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
            dense.bias.requires_grad_(self.bias.requires_grad)
            dense.bias_added = self.bias_added
        made: nn.Module = dense.train(self.training)
        return made

    @torch.no_grad()
    def truncate(self, rank: int) -> None:
        """Keep the first ``rank`` components, in place; see ``LowRankLinear.truncate``.

        Raises
        ------
        InputError
            When the rank is not in ``[1, current rank]``.
        """
        if not 1 <= rank <= self.rank:
            raise InputError(f"cannot truncate rank {self.rank} to {rank}")
        first, second = self.prefix(rank)
        grad = self.first.requires_grad
        self.first = nn.Parameter(first.clone(), requires_grad=grad)
        self.second = nn.Parameter(second.clone(), requires_grad=grad)

    def prefix(self, rank: int) -> tuple[Tensor, Tensor]:
        """Both factors' first ``rank`` components."""
        # Groups and filters have components of their own.
        own = self.out_channels if self.scheme == "decouple" else self.groups
        stacked = self.first.reshape(own, self.rank, *self.first.shape[1:])
        first = stacked[:, :rank].flatten(0, 1)
        return first, self.second[:, :rank]

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        shown = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"rank={self.rank}, scheme={self.scheme!r}, stride={self.stride}"
        )
        if self.padding not in ((0,) * len(self.kernel_size), "valid"):
            shown += f", padding={self.padding!r}"
        if self.groups > 1:
            shown += f", groups={self.groups}"
        return f"{shown}, bias={self.bias is not None}"


class LowRankConv1d(LowRankConv):
    """:class:`LowRankConv` over one dimension: channel-wise, or decoupled."""

    dense = nn.Conv1d


class LowRankConv2d(LowRankConv):
    """:class:`LowRankConv` over two dimensions."""

    dense = nn.Conv2d


class LowRankConv3d(LowRankConv):
    """:class:`LowRankConv` over three dimensions: channel-wise, or decoupled."""

    dense = nn.Conv3d


_CLASSES: dict[int, type[LowRankConv]] = {1: LowRankConv1d, 2: LowRankConv2d, 3: LowRankConv3d}
