"""Truncated, randomized and warm-started SVD, and orthonormal bases."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.linalg import (
    orthonormal_basis,
    randomized_svd,
    subspace_iteration,
    truncated_svd,
)

SHAPES = [(40, 17), (17, 40), (23, 23), (31, 1), (1, 9)]
METHODS = {
    "truncated": truncated_svd,
    "randomized": lambda A, r: randomized_svd(A, r, iterations=6, generator=0),
    "iteration": lambda A, r: subspace_iteration(A, r, iterations=60, generator=0),
}


def decaying(m, n, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    k = min(m, n)
    U = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    return ((U * 0.5 ** torch.arange(k, dtype=torch.float64)) @ V.T).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", METHODS)
def test_leading_triplets_are_those_of_the_full_svd(method, shape):
    A = decaying(*shape)
    rank = min(4, *shape)
    U, S, Vh = torch.linalg.svd(A, full_matrices=False)
    found = METHODS[method](A, rank)
    assert found.U.shape == (shape[0], rank)
    assert found.Vh.shape == (rank, shape[1])
    torch.testing.assert_close(found.S, S[:rank], rtol=1e-7, atol=0)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    torch.testing.assert_close(found.matrix(), best, rtol=0, atol=1e-6)
    eye = torch.eye(rank, dtype=torch.float64)
    torch.testing.assert_close(found.U.T @ found.U, eye)
    torch.testing.assert_close(found.Vh @ found.Vh.T, eye)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_dtype_of_the_result(method, dtype, expected):
    found = METHODS[method](decaying(12, 9, dtype=dtype), 3)
    assert {t.dtype for t in found} == {expected}


@pytest.mark.parametrize("method", METHODS)
def test_strides_do_not_matter(method):
    A = decaying(20, 30)
    strided = torch.zeros(60, 40, dtype=torch.float64)
    strided[::2, ::2] = A.T
    torch.testing.assert_close(
        METHODS[method](strided[::2, ::2].T, 3).matrix(), METHODS[method](A, 3).matrix()
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_matrix_has_zero_values_and_finite_vectors(method):
    found = METHODS[method](torch.zeros(6, 5), 2)
    assert found.S.tolist() == [0, 0]
    assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("matrix", "rank", "says"),
    [
        (torch.ones(5), 1, "two dimensions"),
        (torch.ones(0, 3), 1, "empty"),
        (torch.ones(3, 3, dtype=torch.int64), 1, "floating-point"),
        (torch.tensor([[1.0, float("nan")]]), 1, "NaN"),
        (torch.tensor([[1.0, float("inf")]]), 1, "NaN or infinite"),
        (torch.ones(3, 4), 4, "rank 4"),
        (torch.ones(3, 4), 0, "rank 0"),
    ],
)
def test_bad_input_is_named(method, matrix, rank, says):
    with pytest.raises(ValueError, match=says):
        METHODS[method](matrix, rank)


def test_a_seed_repeats_and_leaves_the_global_generator_alone():
    A = torch.randn(30, 30, generator=torch.Generator().manual_seed(1))
    before = torch.get_rng_state()
    one = randomized_svd(A, 3, generator=7)
    two = randomized_svd(A, 3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(one.U, two.U)
    assert torch.equal(torch.get_rng_state(), before)


def test_randomized_svd_is_nearly_optimal_on_a_flat_spectrum():
    A = torch.randn(120, 90, generator=torch.Generator().manual_seed(0))
    exact, found = truncated_svd(A, 20), randomized_svd(A, 20, iterations=3, generator=0)
    lost = torch.linalg.matrix_norm(A - found.matrix())
    assert lost <= 1.01 * torch.linalg.matrix_norm(A - exact.matrix())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [2.0**-120, 2.0**120])
def test_extreme_entries_stay_in_range(method, scale):
    A = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    usual, found = METHODS[method](A, 5), METHODS[method](A * scale, 5)
    torch.testing.assert_close(found.S / scale, usual.S)
    torch.testing.assert_close(found.U.T @ found.U, torch.eye(5), rtol=0, atol=1e-5)


def test_a_warm_start_needs_one_step():
    A = decaying(60, 40)
    drifted = A + 1e-4 * torch.randn(60, 40, generator=torch.Generator().manual_seed(3))
    exact = truncated_svd(drifted, 5)
    start = truncated_svd(A, 8).Vh
    warm = subspace_iteration(drifted, 5, start=start)
    cold = subspace_iteration(drifted, 5, generator=0)
    error = (warm.S - exact.S).abs().max()
    assert error < 1e-7
    assert error < (cold.S - exact.S).abs().max()


@pytest.mark.parametrize("start", [torch.ones(2, 7), torch.ones(1, 8), torch.ones(9, 8)])
def test_a_start_that_does_not_fit_is_refused(start):
    with pytest.raises(ValueError, match="start has shape"):
        subspace_iteration(torch.rand(10, 8), 2, start=start)


def test_negative_settings_are_refused():
    with pytest.raises(ValueError, match="negative"):
        randomized_svd(torch.rand(4, 4), 2, oversample=-1)
    with pytest.raises(ValueError, match="iterations"):
        subspace_iteration(torch.rand(4, 4), 2, iterations=0)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 12), rank=st.integers(0, 6), seed=st.integers(0, 999))
def test_a_basis_spans_the_columns_and_has_their_rank(m, n, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    rank = min(rank, m, n)
    A = torch.randn(m, rank, generator=generator, dtype=torch.float64) @ torch.randn(
        rank, n, generator=generator, dtype=torch.float64
    )
    Q = orthonormal_basis(A)
    assert Q.shape == (m, torch.linalg.matrix_rank(A))
    torch.testing.assert_close(Q @ (Q.T @ A), A)
    torch.testing.assert_close(Q.T @ Q, torch.eye(Q.shape[1], dtype=torch.float64))


def test_rtol_drops_weak_directions():
    A = torch.diag(torch.tensor([1.0, 1e-2, 1e-4]))
    assert orthonormal_basis(A).shape == (3, 3)
    assert orthonormal_basis(A, rtol=1e-3).shape == (3, 2)
    assert orthonormal_basis(A.bfloat16(), rtol=0.1).shape == (3, 1)
