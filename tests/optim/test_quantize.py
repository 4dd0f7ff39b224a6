"""Codes of 8 bits: the nearest value, whatever the shape."""

import pytest
import torch

from fullrank.optim import quantize
from fullrank.optim.quantize import BLOCK, Blockwise, dynamic_map


def encoded(x, signed):
    codes = torch.empty(x.shape, dtype=torch.uint8)
    absmax = torch.empty(-(-x.numel() // BLOCK))
    Blockwise(signed).encode(x, codes, absmax)
    return codes, absmax


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_nearest(signed):
    table = dynamic_map(signed)
    middles = (table[1:] + table[:-1]) / 2
    down = torch.nextafter(middles, torch.tensor(-2.0))
    up = torch.nextafter(middles, torch.tensor(2.0))
    spread = torch.linspace(-1 if signed else 0, 1, 20_001)
    small = 10 ** torch.linspace(-40, 0, 20_001)
    x = torch.cat([table, middles, down, up, spread, small, -small if signed else small])
    x = torch.nn.functional.pad(x, (0, -len(x) % (BLOCK - 1))).view(-1, BLOCK - 1)
    # One element of each block is the largest, so that scaling changes nothing.
    x = torch.cat([torch.ones(len(x), 1), x], 1)
    codes, absmax = encoded(x, signed)
    assert bool((absmax == 1).all())
    assert torch.equal(codes.long(), torch.bucketize(x, middles))


@pytest.mark.parametrize("shape", [(1,), (256,), (257,), (3, 100), (16, 64, 2)])
@pytest.mark.parametrize("signed", [True, False])
def test_round_trip(shape, signed):
    torch.manual_seed(0)
    x = torch.randn(shape) if signed else torch.rand(shape)
    codes, absmax = encoded(x, signed)
    decoded = Blockwise(signed).decode(codes, absmax)
    assert (decoded - x).abs().max() < 0.02 * x.abs().max()


def test_zeros_stay_zeros():
    codes, absmax = encoded(torch.zeros(300), True)
    assert not Blockwise(True).decode(codes, absmax).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_value_shows(bad):
    x = torch.ones(300)
    x[3] = bad
    decoded = Blockwise(True).decode(*encoded(x, True))
    assert not torch.isfinite(decoded[:256]).any()
    assert torch.equal(decoded[256:], x[256:])


def test_pieces_are_the_whole(monkeypatch):
    values = torch.randn(2000)
    found = []
    for at_once in (1 << 22, 2 * BLOCK):
        monkeypatch.setattr(quantize, "_AT_ONCE", at_once)
        codes, absmax = torch.empty(2000, dtype=torch.uint8), torch.empty(8)
        Blockwise(signed=True).encode(values, codes, absmax)
        found.append((codes, absmax, Blockwise(signed=True).decode(codes, absmax)))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
