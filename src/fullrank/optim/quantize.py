"""Optimizer state in 8 bits: dynamic codes and one maximum per block (arXiv 2110.02861)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
"""Consecutive elements that share one maximum."""


def dynamic_map(signed: bool) -> Tensor:
    """The 256 values that a code can mean, ascending in [-1, 1] or [0, 1], float32.

    Each code has a decimal exponent in unary and a linear fraction in the bits that are left: small
    numbers keep their magnitude, large ones their precision.

    >>> dynamic_map(True).numel(), dynamic_map(False)[0].item(), dynamic_map(True)[-1].item()
    (256, 0.0, 1.0)
    """
    values = [0.0, 1.0]
    exponents = 7
    for exponent in range(exponents):
        fractions = 2**exponent if signed else 2 ** (exponent + 1)
        edges = torch.linspace(0.1, 1.0, fractions + 1, dtype=torch.float32)
        middles = (edges[:-1] + edges[1:]) / 2.0
        scaled = (10.0 ** (exponent - exponents + 1) * middles).tolist()
        values += scaled
        if signed:
            values += [-value for value in scaled]
    return torch.tensor(sorted(values), dtype=torch.float32)


@lru_cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    table = dynamic_map(signed)
    return table.to(device), ((table[1:] + table[:-1]) / 2).to(device)


class Blockwise:
    """Encoder and decoder between float32 and codes.

    Parameters
    ----------
    signed
        First moments are signed, second moments are not.

    Examples
    --------
    >>> x = torch.tensor([0.5, -2.0, 0.0])
    >>> codes, absmax = torch.empty(3, dtype=torch.uint8), torch.empty(1)
    >>> Blockwise(signed=True).encode(x, codes, absmax)
    >>> (Blockwise(signed=True).decode(codes, absmax) - x).abs().max().item() < 0.02
    True
    """

    def __init__(self, signed: bool) -> None:
        self.signed = signed

    def encode(self, values: Tensor, codes: Tensor, absmax: Tensor) -> None:
        """Write the nearest codes of ``values``, and each block's largest magnitude, in place."""
        _, middles = _tables(self.signed, values.device)
        flat = values.reshape(-1)
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        torch.amax(blocks.abs(), dim=1, out=absmax)
        scaled = blocks / absmax.unsqueeze(1).clamp_min(torch.finfo(absmax.dtype).tiny)
        nearest = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
        codes.copy_(nearest.view(-1)[: flat.numel()].view(codes.shape))

    def decode(self, codes: Tensor, absmax: Tensor) -> Tensor:
        """Return the float32 values of ``codes``."""
        table, _ = _tables(self.signed, codes.device)
        flat = table[codes.reshape(-1).int()]
        blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
        return (blocks * absmax.unsqueeze(1)).view(-1)[: flat.numel()].view(codes.shape)
