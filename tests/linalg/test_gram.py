"""Spectra by way of the Gram matrix, and sampled ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.linalg import gram_spectrum, sampled_spectrum


def planted(m, n, values, seed=0):
    generator = torch.Generator().manual_seed(seed)
    k = len(values)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    return (U * values) @ V.T


def power_law(k, exponent):
    return torch.arange(1, k + 1, dtype=torch.float64) ** -exponent


@pytest.mark.parametrize("shape", [(300, 300), (300, 701), (701, 300)])
@pytest.mark.parametrize("exponent", [0.2, 0.5, 1.0, 1.5, 2.0])
def test_power_laws_to_1e_5_in_every_value(shape, exponent):
    values = power_law(300, exponent)
    found = gram_spectrum(planted(*shape, values))
    torch.testing.assert_close(found, values, rtol=1e-5, atol=0)


def test_what_the_docstring_says_of_the_tail():
    values = torch.logspace(0, -12, 60, dtype=torch.float64)
    error = (gram_spectrum(planted(80, 60, values)) / values - 1).abs()
    assert error[values >= 1e-3].max() < 1e-9
    assert error[values >= 1e-5].max() < 1e-5


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 14), n=st.integers(1, 14), seed=st.integers(0, 999))
def test_agrees_with_an_svd(m, n, seed):
    A = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(gram_spectrum(A), torch.linalg.svdvals(A), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_lose_nothing(dtype):
    A = planted(50, 40, power_law(40, 1.0)).to(dtype)
    expected = torch.linalg.svdvals(A.double())
    torch.testing.assert_close(gram_spectrum(A), expected, rtol=1e-9, atol=0)


def test_strides_gradients_and_blocks_do_not_matter():
    A = torch.randn(9000, 7, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.svdvals(A.double())
    wide = torch.zeros(14, 9000)
    wide[::2] = A.T
    for matrix in (A, A.T, wide[::2], A.clone().requires_grad_()):
        torch.testing.assert_close(gram_spectrum(matrix), expected)


@pytest.mark.parametrize("scale", [1e-200, 1e-30, 1e30, 1e200])
def test_extreme_scales(scale):
    A = planted(9, 6, power_law(6, 1.0))
    torch.testing.assert_close(gram_spectrum(A * scale) / scale, power_law(6, 1.0))


def test_zero_matrix():
    assert gram_spectrum(torch.zeros(4, 3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("function", [gram_spectrum, sampled_spectrum])
@pytest.mark.parametrize(
    ("matrix", "says"),
    [
        (torch.ones(5), "two dimensions"),
        (torch.ones(3, 0), "empty"),
        (torch.ones(3, 3, dtype=torch.int32), "floating-point"),
        (torch.tensor([[float("nan"), 1.0]]), "NaN"),
        (torch.tensor([[float("-inf"), 1.0]]), "NaN or infinite"),
    ],
)
def test_bad_input_is_named(function, matrix, says):
    with pytest.raises(ValueError, match=says):
        function(matrix)


@pytest.mark.parametrize("exponent", [0.2, 0.8, 1.25, 2.0])
@pytest.mark.parametrize("shape", [(320, 320), (320, 500), (500, 320)])
def test_sampled_spectra_are_close(exponent, shape):
    values = power_law(320, exponent)
    found = sampled_spectrum(planted(*shape, values).float(), generator=1)
    assert found.values.shape == (320,)
    assert found.replicates.shape == (8, 320)
    assert (found.values.diff() <= 0).all()
    torch.testing.assert_close(found.values.sum(), values.sum(), rtol=0.02, atol=0)
    torch.testing.assert_close(
        found.values.square().sum(), values.square().sum(), rtol=1e-5, atol=0
    )
    leading = min(found.leading, 5)
    torch.testing.assert_close(found.values[:leading], values[:leading], rtol=1e-3, atol=0)


@pytest.mark.parametrize("scale", [2.0**-100, 2.0**100])
def test_sampled_spectra_of_extreme_scales(scale):
    matrix = torch.randn(60, 80, generator=torch.Generator().manual_seed(0))
    usual = sampled_spectrum(matrix, generator=0).values
    assert torch.allclose(sampled_spectrum(matrix * scale, generator=0).values / scale, usual)


def test_sampled_spectra_of_low_rank_and_zero_matrices():
    A = planted(90, 70, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).float()
    found = sampled_spectrum(A, generator=0).values
    torch.testing.assert_close(
        found[:3], torch.tensor([3.0, 2, 1], dtype=torch.float64), rtol=1e-4, atol=0
    )
    assert found[3:].abs().max() < 1e-2
    assert sampled_spectrum(torch.zeros(9, 7), generator=0).values.tolist() == [0] * 7


@pytest.mark.parametrize("shape", [(11, 30), (5, 9), (60, 60)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_sampled_spectra_of_rank_one_hold_no_rounding(shape, dtype):
    first = (shape[0] * shape[1]) ** 0.5
    estimate = sampled_spectrum(torch.ones(shape, dtype=dtype), generator=0)
    for values in (estimate.values, *estimate.replicates, estimate.coarse):
        assert float(values[0]) == pytest.approx(first, rel=1e-5)
        assert values[1:].abs().max() < 1e-5 * first


def test_sampled_spectra_of_tiny_matrices_and_repeats():
    A = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        sampled_spectrum(A, generator=0).values, torch.linalg.svdvals(A).double(), rtol=1e-4, atol=0
    )
    B = torch.randn(100, 120, generator=torch.Generator().manual_seed(0))
    one, two = sampled_spectrum(B, generator=5), sampled_spectrum(B, generator=5)
    assert torch.equal(one.values, two.values)
    with pytest.raises(ValueError, match="probes"):
        sampled_spectrum(B, probes=1)
