"""Optimizer state in 8 bits: dynamic codes and one maximum per block (arXiv 2110.02861)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

BLOCK = 256
"""Consecutive elements that share one maximum."""

# Elements that are worked on at a time: what is alive beside the arrays stays small.
_AT_ONCE = 1 << 22


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


# Nearest codes are looked up by the leading bits of a float32: sign, exponent and eight bits of
# mantissa. Of values that share these, at most two codes are nearest, so that one comparison
# decides. A binary search among 255 boundaries gives the same codes in fifteen times the time.
_SHIFT = 15
_BINS = 1 << (32 - _SHIFT)


@lru_cache
def _values(signed: bool, device: torch.device) -> Tensor:
    """What each code means."""
    return dynamic_map(signed).to(device)


@lru_cache
def _bins(signed: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each bin: the lower of its codes, and the value above which the next one is nearer."""
    table = dynamic_map(signed)
    middles = (table[1:] + table[:-1]) / 2
    first = (torch.arange(_BINS, dtype=torch.int64) << _SHIFT).to(torch.int32)
    ends = torch.stack([first, first | ((1 << _SHIFT) - 1)]).view(torch.float32)
    # Bins of NaN: any code will do, the block's maximum is NaN too.
    low = torch.bucketize(ends.nan_to_num(nan=0.0).amin(dim=0), middles)
    above = torch.cat([middles, middles.new_tensor([torch.inf])])[low]
    return low.to(torch.uint8).to(device), above.to(device)


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
        low, above = _bins(self.signed, values.device)
        pieces = zip(
            torch.split(values.reshape(-1), _AT_ONCE),
            torch.split(codes.view(-1), _AT_ONCE),
            torch.split(absmax, _AT_ONCE // BLOCK),
            strict=True,
        )
        for flat, out, largest in pieces:
            blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
            torch.amax(blocks.abs(), dim=1, out=largest)
            scaled = blocks / largest.unsqueeze(1).clamp_min(torch.finfo(absmax.dtype).tiny)
            scaled = scaled.view(-1)[: flat.numel()]
            bins = (scaled.view(torch.int32) >> _SHIFT).bitwise_and_(_BINS - 1)
            torch.add(low.index_select(0, bins), scaled > above.index_select(0, bins), out=out)

    def decode(self, codes: Tensor, absmax: Tensor) -> Tensor:
        """Return the float32 values of ``codes``."""
        table = _values(self.signed, codes.device)
        values = torch.empty(codes.shape, dtype=table.dtype, device=codes.device)
        pieces = zip(
            torch.split(codes.reshape(-1), _AT_ONCE),
            torch.split(values.view(-1), _AT_ONCE),
            torch.split(absmax, _AT_ONCE // BLOCK),
            strict=True,
        )
        for coded, out, largest in pieces:
            flat = table.index_select(0, coded.int())
            blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
            out.copy_((blocks * largest.unsqueeze(1)).view(-1)[: flat.numel()])
        return values
