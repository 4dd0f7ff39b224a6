"""Principal angles between leading subspaces."""

import numpy as np
import pytest
import torch

from fullrank.core import InputError
from fullrank.spectra import overlap as module
from fullrank.spectra.overlap import leading_subspaces, subspace_overlap


@pytest.fixture(params=[(30, 20), (20, 30), (21, 21)])
def weight(request):
    torch.manual_seed(0)
    return torch.randn(request.param, dtype=torch.float64)


def test_bases_are_those_of_the_svd(weight):
    left, right = leading_subspaces(weight, 6)
    U, _, Vh = torch.linalg.svd(weight)
    for basis, expected in ((left, U[:, :6]), (right, Vh[:6].T)):
        assert torch.allclose(basis.T @ basis, torch.eye(6, dtype=torch.float64), atol=1e-10)
        assert torch.allclose(basis @ basis.T, expected @ expected.T, atol=1e-8)


def test_large_matrices_are_sampled_to_the_same(weight, monkeypatch):
    U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
    values = torch.logspace(0, -3, min(weight.shape), dtype=torch.float64)
    steep = U * values @ Vh
    exact = leading_subspaces(steep, 4)
    monkeypatch.setattr(module, "_FULL", 1)
    for one, two in zip(exact, leading_subspaces(steep, 4), strict=True):
        assert torch.allclose(one @ one.T, two @ two.T, atol=1e-4)


def test_same_scaled_rotated_and_orthogonal(weight):
    same = subspace_overlap(weight, -3 * weight, 5)
    np.testing.assert_allclose([*same.left, *same.right], 1, atol=1e-9)
    Q = torch.linalg.qr(torch.randn(len(weight), len(weight), dtype=torch.float64)).Q
    turned = subspace_overlap(weight, Q @ weight, 5)
    np.testing.assert_allclose(turned.right, 1, atol=1e-9)
    assert turned.left_share < 0.9
    assert turned.by_chance == (5 / weight.shape[0], 5 / weight.shape[1])
    U, _, Vh = torch.linalg.svd(weight)
    one, other = U[:, :4] @ Vh[:4], U[:, 4:8] @ Vh[4:8]
    apart = subspace_overlap(one, other, 4)
    assert apart.left_share == pytest.approx(0, abs=1e-9)
    assert apart.right_share == pytest.approx(0, abs=1e-9)


def test_known_angle():
    c, s = np.cos(0.3), np.sin(0.3)
    one = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    other = torch.tensor([[c, 0.0], [s, 0.0], [0.0, 0.0]])
    found = subspace_overlap(one, other, 1)
    assert found.left[0] == pytest.approx(c, abs=1e-7)
    assert found.right_share == pytest.approx(1)


def test_chance_is_what_random_subspaces_share():
    torch.manual_seed(5)
    shares = [
        subspace_overlap(torch.randn(40, 24), torch.randn(40, 24), 6).left_share for _ in range(30)
    ]
    assert np.mean(shares) == pytest.approx(6 / 40, abs=0.03)


def test_bad_input(weight):
    with pytest.raises(InputError, match="shapes"):
        subspace_overlap(weight, weight[:-1], 2)
    with pytest.raises(InputError, match="rank 99"):
        subspace_overlap(weight, weight, 99)
