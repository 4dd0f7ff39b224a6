"""What is asked of matrices before any work is done."""

import math

import pytest
import torch

from fullrank.linalg.checks import all_finite, largest_magnitude


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_however_large_the_sum(dtype):
    largest = torch.full((300, 7), torch.finfo(dtype).max, dtype=dtype)
    assert all_finite(largest)
    assert all_finite(largest[:, ::2])
    assert all_finite(torch.zeros(0, 3, dtype=dtype))
    for odd in (math.nan, math.inf, -math.inf):
        spoilt = largest.clone()
        spoilt[299, 6] = odd
        assert not all_finite(spoilt)
        assert not all_finite(spoilt.T)
    opposite = torch.tensor([[math.inf, -math.inf]], dtype=dtype)
    assert not all_finite(opposite)


def test_the_largest_magnitude_in_any_order():
    matrix = torch.tensor([[1.0, -3.0, 2.0], [0.5, 2.5, -1.0]])
    for view in (matrix, matrix.T, matrix[:, :2], matrix.T[:2]):
        assert largest_magnitude(view) == float(view.abs().max())
    assert math.isnan(largest_magnitude(torch.tensor([[1.0, math.nan]]).T))
