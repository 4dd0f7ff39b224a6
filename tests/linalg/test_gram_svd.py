"""Leading triplets by the Gram matrix: as good as the best of that rank."""

import pytest
import torch

from fullrank.linalg.gram_svd import gram_svd


def planted(m, n, sizes, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(side, len(sizes), generator=g, dtype=torch.float64)).Q
        for side in (m, n)
    )
    return ((U * sizes) @ V.T).to(dtype)


def spectrum(name, k):
    i = torch.arange(1, k + 1, dtype=torch.float64)
    return {
        "flat": 1 + 1 / i,
        "power": 1 / i,
        "root": i**-0.5,
        "steep": torch.exp(-i / 40),
        "low rank": (i <= max(1, k // 4)).double(),
    }[name]


@pytest.mark.parametrize("shape", [(320, 300), (300, 500), (40, 24), (24, 40), (7, 1)])
@pytest.mark.parametrize("name", ["flat", "power", "root", "steep", "low rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("orthonormal", [True, False])
def test_the_error_is_within_a_thousandth_of_the_least(shape, name, dtype, orthonormal):
    k = min(shape)
    A = planted(*shape, spectrum(name, k), dtype)
    wide = A.double()
    S = torch.linalg.svdvals(wide)
    for rank in {1, max(1, k // 3), max(1, k // 2), k}:
        svd, lost = gram_svd(A, rank, orthonormal=orthonormal)
        error = (wide - svd.matrix().double()).square().sum()
        least = S[rank:].square().sum()
        assert error <= least * 1.004 + 1e-11 * S[0] ** 2
        assert lost == pytest.approx((least / S.square().sum()).item(), rel=1e-2, abs=1e-11)
        # Without orthonormal vectors, the smallest of those kept are less certain.
        near = {"rtol": 2e-3 if orthonormal else 2e-2, "atol": 1e-7 * S[0].item()}
        torch.testing.assert_close(svd.S.double(), S[:rank], **near)
        tolerance = 2e-3 if svd.U.dtype == torch.float32 else 1e-6
        if orthonormal:
            eye = torch.eye(rank, dtype=svd.U.dtype)
            torch.testing.assert_close(svd.U.T @ svd.U, eye, rtol=0, atol=tolerance)
            torch.testing.assert_close(svd.Vh @ svd.Vh.T, eye, rtol=0, atol=tolerance)


def test_what_float32_resolves_is_worked_on_in_it():
    flat, steep, low = (
        planted(320, 300, spectrum(name, 300), torch.float32)
        for name in ("flat", "steep", "low rank")
    )
    assert gram_svd(flat, 150).svd.U.dtype == torch.float32
    assert gram_svd(steep, 150).svd.U.dtype == torch.float64
    # All of a matrix of low rank is found: what is dropped is too little for float32.
    svd, lost = gram_svd(low, 75)
    assert svd.U.dtype == torch.float64
    assert lost < 1e-12
    assert (svd.matrix() - low.double()).norm() < 1e-6 * low.norm()
    assert gram_svd(flat[:100], 50).svd.U.dtype == torch.float64


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_extreme_entries_are_squared_in_range(scale):
    A = planted(300, 280, spectrum("flat", 280), torch.float32)
    svd, lost = gram_svd(A * scale, 100)
    plain = gram_svd(A, 100)
    torch.testing.assert_close(svd.S / scale, plain.svd.S, rtol=1e-4, atol=0)
    assert lost == pytest.approx(plain.lost, rel=1e-4)


def test_zeros_and_other_strides():
    svd, lost = gram_svd(torch.zeros(4, 3), 2)
    assert lost == 0
    assert torch.equal(svd.matrix(), torch.zeros(4, 3, dtype=torch.float64))
    A = planted(300, 280, spectrum("flat", 280), torch.float32)
    torch.testing.assert_close(gram_svd(A.T.contiguous().T, 9).svd.S, gram_svd(A, 9).svd.S)


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_vectors_of_what_is_small_are_orthonormal(shape):
    A = planted(*shape, torch.logspace(0, -9, 40, dtype=torch.float64))
    for matrix in (A, torch.zeros(shape)):
        svd = gram_svd(matrix, 40).svd
        eye = torch.eye(40, dtype=torch.float64)
        torch.testing.assert_close(svd.U.T @ svd.U, eye)
        torch.testing.assert_close(svd.Vh @ svd.Vh.T, eye)
        torch.testing.assert_close(svd.matrix(), matrix.double(), rtol=0, atol=1e-14)


def test_bad_input_is_named():
    A = torch.randn(4, 3)
    for bad, rank, message in [
        (A, 0, "expected 1 to 3"),
        (A, 4, "expected 1 to 3"),
        (A[0], 1, "two dimensions"),
        (A * float("nan"), 1, "NaN"),
        (A.int(), 1, "floating-point"),
    ]:
        with pytest.raises(ValueError, match=message):
            gram_svd(bad, rank)
