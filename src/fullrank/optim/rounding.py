"""Stochastic rounding: bfloat16 weights that do not lose small steps."""

from __future__ import annotations

import torch
from torch import Tensor


def stochastic_round_(target: Tensor, values: Tensor, generator: torch.Generator) -> Tensor:
    """Write float32 ``values`` to a bfloat16 tensor, up or down at random.

    Each value goes to one of its two neighbours, the nearer one with the greater probability, so
    that the expectation is the value itself. Steps too small to move a weight by rounding to
    nearest then still move it on average.

    Parameters
    ----------
    target
        bfloat16, of any strides.
    values
        float32, of the same shape.
    generator
        On the device of the values.

    Examples
    --------
    >>> target = torch.zeros(1000, dtype=torch.bfloat16)
    >>> values = torch.full((1000,), 1.0 + 2.0**-9)  # a quarter of the way to the next one
    >>> generator = torch.Generator().manual_seed(0)
    >>> mean = stochastic_round_(target, values, generator).float().mean()
    >>> bool((mean - 1.0 - 2.0**-9).abs() < 4e-4)
    True
    """
    # bfloat16 is the upper half of float32: a carry out of the lower half is the rounding up.
    bits = torch.empty_like(values, dtype=torch.int32, memory_format=torch.contiguous_format)
    bits.random_(0, 1 << 16, generator=generator)
    bits.add_(values.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    rounded = bits.view(torch.float32)
    return target.copy_(torch.where(torch.isfinite(values), rounded, values))
