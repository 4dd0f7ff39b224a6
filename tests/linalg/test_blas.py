"""The same numbers by either library, whichever the number of threads chooses."""

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from fullrank.linalg import blas, gram_spectrum
from fullrank.linalg.gram_svd import gram_svd


@pytest.fixture(params=[1, 2], ids=["numpy", "torch"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def blas_threads():
    return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}


def draw(*shape, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_and_eigenvalues(threads, dtype):
    A = draw(50, 9, dtype=dtype).T.contiguous().T  # by columns, as a transposed weight is
    exact = A.double().numpy()
    tolerance = {"rtol": 0, "atol": 1e-4 if dtype == torch.float32 else 1e-11}
    np.testing.assert_allclose(blas.gram(A), exact.T @ exact, **tolerance)
    np.testing.assert_allclose(
        blas.thin_product(A.T, A[:, :3]), exact.T @ exact[:, :3], **tolerance
    )
    S = blas.gram(A)
    values, vectors = blas.eigh(S)
    assert values.dtype == vectors.dtype == dtype
    np.testing.assert_allclose((vectors * values) @ vectors.T, S, **tolerance)
    np.testing.assert_allclose(blas.eigvalsh(S), values, **tolerance)


def test_what_is_built_on_them(threads):
    A = draw(5000, 9)
    torch.testing.assert_close(gram_spectrum(A), torch.linalg.svdvals(A), rtol=1e-10, atol=0)
    (U, S, Vh), _ = gram_svd(A, 9)
    torch.testing.assert_close((U * S) @ Vh, A, rtol=0, atol=1e-10)


def test_numpy_keeps_to_one_thread_and_gets_its_own_back():
    with threadpool_limits(2, user_api="blas"):
        before = blas_threads()
        with blas._one_thread():
            assert blas_threads() == {1}
            with blas._one_thread():
                assert blas_threads() == {1}
        assert blas_threads() == before


def test_numpy_has_its_turn_with_one_thread_only(threads):
    assert blas._numpy_pays(draw(2, 2)) == (threads == 1)
