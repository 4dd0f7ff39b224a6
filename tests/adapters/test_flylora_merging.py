"""FlyLoRA tasks merged: sums of outputs, sizes that differ, what is refused."""

import pytest
import torch

from fullrank.adapters.flylora_merging import Experts, merge_experts
from fullrank.adapters.flylora_routing import sparse_projection
from fullrank.core.errors import InputError


def task(r, k, seed, m=6, n=20, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    A = sparse_projection(r, n, k / r, seed).double()
    B = torch.randn(m, r, generator=generator, dtype=torch.float64)
    d = 0.01 * torch.randn(r, generator=generator, dtype=torch.float64)
    return Experts(A, B, d, [(r, k)], scale)


def test_the_merged_task_adds_the_outputs():
    parts = [task(8, 2, 0), task(5, 5, 1, scale=0.5), task(1, 1, 2)]
    weights = [0.5, -2.0, 1.0]
    x = torch.randn(3, 4, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    h = torch.ones(3, 4, 6, dtype=torch.float64)
    merged = merge_experts(parts, weights)
    zero = torch.zeros_like(h)
    expected = h + sum(w * part(zero, x)[0] for part, w in zip(parts, weights, strict=True))
    found, taken = merged(h, x)
    torch.testing.assert_close(found, expected)
    assert torch.equal(taken, torch.cat([part(zero, x)[1] for part in parts], -1))
    # Merged ones merge again.
    twice = merge_experts([merged, parts[0]], [1.0, 1.0])(zero, x)[0]
    torch.testing.assert_close(twice, expected - h + parts[0](zero, x)[0])


def test_equal_weights_by_default_and_the_parts_stay_as_they_are():
    part = task(8, 2, 0)
    before = part.B.clone()
    x, zero = torch.ones(1, 20, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64)
    torch.testing.assert_close(merge_experts([part, part])(zero, x)[0], part(zero, x)[0])
    assert torch.equal(part.B, before)


@pytest.mark.parametrize(
    ("parts", "weights", "message"),
    [
        ([], None, "no task"),
        ([task(4, 1, 0)], [1.0, 2.0], "1 finite numbers"),
        ([task(4, 1, 0)], [float("nan")], "1 finite numbers"),
        ([task(4, 1, 0), task(4, 1, 0, n=21)], None, "task 1 is of a layer"),
    ],
)
def test_bad_input(parts, weights, message):
    with pytest.raises(InputError, match=message):
        merge_experts(parts, weights)
