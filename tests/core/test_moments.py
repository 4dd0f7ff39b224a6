"""Streaming moments do not depend on how samples come."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fullrank.core import InputError, Moments


@pytest.fixture(scope="module")
def samples():
    return torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def of(*batches, **options):
    moments = Moments(5, **options)
    for batch in batches:
        moments.update(batch)
    return moments


def same(a, b):
    assert a.count == b.count
    torch.testing.assert_close(a.sum, b.sum, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(a.second, b.second, rtol=1e-12, atol=1e-12)


def test_agrees_with_torch(samples):
    moments = of(samples)
    torch.testing.assert_close(moments.mean, samples.mean(0))
    torch.testing.assert_close(moments.covariance, torch.cov(samples.T, correction=0))
    torch.testing.assert_close(moments.second_moment, samples.T @ samples / 40)
    assert torch.equal(moments.covariance, moments.covariance.T)


@given(cuts=st.lists(st.integers(0, 40), max_size=6), joined=st.integers(0, 6))
def test_neither_cuts_nor_shards_matter(samples, cuts, joined):
    edges = [0, *sorted(cuts), 40]
    batches = [samples[a:b] for a, b in pairwise(edges)]
    whole = of(samples)
    same(of(*batches), whole)
    first, second = of(*batches[:joined]), of(*batches[joined:])
    first.merge(second)
    same(first, whole)


def test_leading_dimensions_and_masks(samples):
    mask = torch.arange(40) % 3 != 0
    moments = Moments(5)
    moments.update(samples.reshape(4, 10, 5), mask.reshape(4, 10))
    same(moments, of(samples[mask]))
    numbers = Moments(5)
    numbers.update(samples, mask.long())
    same(numbers, moments)
    one = Moments(5)
    one.update(samples[0])
    assert one.count == 1
    nothing = of(samples)
    nothing.update(samples, torch.zeros(40, dtype=torch.bool))
    same(nothing, of(samples))


def test_small_types_are_summed_in_float64():
    batch = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    moments = Moments(1)
    moments.update(batch)
    assert moments.sum.item() == 4096.0
    assert moments.sum.dtype == moments.second.dtype == torch.float64


def test_gradients_are_not_kept(samples):
    batch = samples.clone().requires_grad_()
    assert not of(batch).sum.requires_grad


def test_state_comes_back_and_is_a_copy(samples):
    moments = of(samples[:20])
    state = moments.state_dict()
    moments.update(samples[20:])
    resumed = Moments(5)
    resumed.load_state_dict(state)
    assert resumed.count == 20
    resumed.update(samples[20:])
    same(resumed, moments)
    with pytest.raises(InputError, match="the state is of width 5, these moments are 3"):
        Moments(3).load_state_dict(state)


@pytest.mark.parametrize(
    ("batch", "mask", "says"),
    [
        (torch.ones(3, 4), None, "width 5"),
        (torch.tensor(1.0), None, "width 5"),
        (torch.ones(3, 5, dtype=torch.long), None, "floating-point"),
        (torch.tensor([[float("nan"), 0, 0, 0, 0]]), None, "NaN or infinite"),
        (torch.tensor([[float("inf"), 0, 0, 0, 0], [-float("inf"), 0, 0, 0, 0]]), None, "infinite"),
        (torch.ones(2, 3, 5), torch.ones(3, 2), "mask of shape"),
        (torch.ones(3, 5), torch.ones(4), "mask of shape"),
    ],
)
def test_bad_batches_change_nothing(samples, batch, mask, says):
    moments = of(samples)
    with pytest.raises(InputError, match=says):
        moments.update(batch, mask)
    same(moments, of(samples))


def test_nothing_seen_and_other_widths():
    for what in ("mean", "covariance", "second_moment"):
        with pytest.raises(InputError, match="no samples were seen"):
            getattr(Moments(2), what)
    with pytest.raises(InputError, match="width 0"):
        Moments(0)
    with pytest.raises(InputError, match="widths 2 and 3"):
        Moments(2).merge(Moments(3))
