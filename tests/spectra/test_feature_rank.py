"""The three ranks of features."""

import pytest
import torch

from fullrank.core.errors import InputError
from fullrank.spectra import effective_rank, feature_rank


def planted(values, rows=40, width=12):
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, width, generator=generator).double()).Q
    right = torch.linalg.qr(torch.randn(width, width, generator=generator).double()).Q
    sigma = torch.zeros(width, dtype=torch.float64)
    sigma[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return (left * sigma) @ right


def test_definitions_on_planted_values():
    features = planted([40.0, 8.0, 1.0, 0.05])
    # Divided by sqrt(40) the last one is 0.008.
    assert feature_rank(features) == 3
    assert feature_rank(features, eps=0.001) == 4
    assert feature_rank(features, kind="srank") == 3
    assert feature_rank(features, kind="srank", delta=0.05) == 2
    assert feature_rank(features.numpy(), kind="srank", delta=0) <= 12
    assert feature_rank(features, kind="effective") == pytest.approx(effective_rank(features))


def test_numerical_rank_does_not_grow_with_repeated_samples():
    features = planted([3.0, 2.0, 0.5])
    assert feature_rank(torch.cat([features] * 5)) == feature_rank(features)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dead_features(dtype):
    dead = torch.zeros(5, 3, dtype=dtype)
    assert feature_rank(dead) == 0
    assert feature_rank(dead, kind="srank") == 0
    assert feature_rank(torch.ones(1, 3, dtype=dtype)) == 1


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (torch.ones(3), {}, "expected .samples, width"),
        (torch.ones(3, 2, dtype=torch.int64), {}, "floating-point"),
        (torch.full((3, 2), float("inf")), {}, "infinite"),
        (torch.ones(3, 2), {"kind": "rank"}, "srank"),
        (torch.ones(3, 2), {"kind": "srank", "delta": 1.5}, "delta"),
        (torch.ones(3, 2), {"kind": "srank", "delta": -0.5}, "delta"),
    ],
)
def test_bad_input(features, options, message):
    with pytest.raises(InputError, match=message):
        feature_rank(features, **options)
