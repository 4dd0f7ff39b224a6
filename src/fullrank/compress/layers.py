"""`LowRankLinear`: a dense layer as two thin ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.adapters.bases import register_factorised
from fullrank.compress.layers_weight import product_weight
from fullrank.core.errors import InputError, require


class LowRankLinear(nn.Module):
    """``y = second @ (first @ x) + bias``, in the place of an ``nn.Linear``.

    It costs ``rank * (in + out)`` numbers instead of ``in * out``, and as many multiplications
    a sample.

    Parameters
    ----------
    in_features, out_features
        As in ``nn.Linear``.
    rank
        Rank r in ``[1, min(in, out)]``.
    bias
        Whether ``second`` is followed by a bias. Factors found from activations need one, even
        where the dense layer had none.
    device, dtype
        Of the parameters.
    transposed
        The layer stands for a transformers ``Conv1D``, so ``weight`` is shown as ``(in, out)``.

    Attributes
    ----------
    first : Parameter
        ``(r, in)``.
    second : Parameter
        ``(out, r)``.
    bias : Parameter or None
        ``(out,)``.
    method : str
        How the factors were made, if by one of the solvers.
    error : float or None
        Their relative squared error at that time; see :class:`~fullrank.compress.Factors`.
    bias_added : bool
        The dense layer had no bias, so that its architecture would not load this one.

    Examples
    --------
    >>> layer = LowRankLinear(8, 4, rank=2)
    >>> layer(torch.zeros(3, 8)).shape, layer.merged_weight().shape
    (torch.Size([3, 4]), torch.Size([4, 8]))
    """

    bias: Tensor | None
    method: str = ""
    error: float | None = None
    bias_added: bool = False

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        if in_features < 1 or out_features < 1:
            raise InputError(f"a layer from {in_features} to {out_features} features has no weight")
        if not 1 <= rank <= min(in_features, out_features):
            raise InputError(
                f"rank {rank} for a layer from {in_features} to {out_features} features; it must "
                f"lie in [1, {min(in_features, out_features)}]"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.transposed = transposed
        self.first = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        self.second = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new factors; their product has the variance of an ``nn.Linear``'s weight."""
        if self.first.is_meta:
            return
        # nn.Linear draws from U(-1/sqrt(n), 1/sqrt(n)), variance 1 / (3 n). Two factors drawn that
        # way have a product of variance 1 / (9 n): one of them is widened to make up for it.
        nn.init.uniform_(self.first, *_interval(self.in_features))
        nn.init.uniform_(self.second, *_interval(self.rank, math.sqrt(3)))
        if self.bias is not None:
            nn.init.uniform_(self.bias, *_interval(self.in_features))

    @property
    def rank(self) -> int:
        """Columns of ``second``, rows of ``first``."""
        return self.first.shape[0]

    @property
    def weight_shape(self) -> tuple[int, int]:
        """``(out, in)`` of the dense weight."""
        return self.out_features, self.in_features

    @property
    def weight(self) -> Tensor:
        """The dense weight these factors stand for, multiplied out when it is computed with.

        Asking for its dtype, shape or device costs nothing, and writing to it is refused.
        """
        shape = (self.out_features, self.in_features)
        return product_weight(
            self._oriented_weight,
            shape[::-1] if self.transposed else shape,
            (self.first, self.second),
        )

    def _oriented_weight(self) -> Tensor:
        merged = self.merged_weight()
        return merged.T if self.transposed else merged

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        thin = functional.linear(x, self.first)
        return functional.linear(thin, self.second, self.bias)

    def merged_weight(self) -> Tensor:
        """``second @ first``, ``(out, in)``."""
        return self.second @ self.first

    @torch.no_grad()
    def to_dense(self) -> nn.Module:
        """Return the dense layer, of the kind replaced, that computes the same up to rounding."""
        dense = self._empty_dense()
        wide = torch.float64 if self.first.device.type != "mps" else torch.float32
        merged = self.second.to(wide) @ self.first.to(wide)
        dense.weight.copy_(merged.T if self.transposed else merged)
        dense.requires_grad_(self.first.requires_grad)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
            dense.bias.requires_grad_(self.bias.requires_grad)
            dense.bias_added = self.bias_added
        made: nn.Module = dense.train(self.training)
        return made

    def _empty_dense(self) -> Any:
        device, dtype = self.first.device, self.first.dtype
        if not self.transposed:
            bias = self.bias is not None
            return nn.Linear(self.in_features, self.out_features, bias, device=device, dtype=dtype)
        # It always has a bias, of zeros at first.
        conv1d = require("transformers.pytorch_utils", extra="hf").Conv1D
        with device:
            return conv1d(self.out_features, self.in_features).to(dtype)

    @torch.no_grad()
    def truncate(self, rank: int) -> None:
        """Keep the first ``rank`` components, in place.

        Components are ordered by importance when the factors come from
        :func:`~fullrank.compress.split`, and stay so under ordered training. An optimizer that
        holds the old parameters must be made anew.

        Raises
        ------
        InputError
            When the rank is not in ``[1, current rank]``.
        """
        if not 1 <= rank <= self.rank:
            raise InputError(f"cannot truncate rank {self.rank} to {rank}")
        first, second = self.first, self.second
        self.first = nn.Parameter(first[:rank].clone(), requires_grad=first.requires_grad)
        self.second = nn.Parameter(second[:, :rank].clone(), requires_grad=second.requires_grad)

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"rank={self.rank}, bias={self.bias is not None}"
        )


def _interval(fan_in: int, widen: float = 1.0) -> tuple[float, float]:
    bound = widen / math.sqrt(fan_in)
    return -bound, bound


def _record(model: nn.Module) -> None:
    from fullrank.compress.factorization import mark

    mark(model)


register_factorised(LowRankLinear, _record)
