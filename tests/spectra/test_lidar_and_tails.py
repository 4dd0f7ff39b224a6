"""LiDAR against the peers' number; power laws that are found again."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fullrank.core.errors import InputError
from fullrank.spectra import Spectrum, heavy_tail_alpha, lidar

ARRAYS = np.load(Path(__file__).parents[1] / "reference" / "rankme" / "rankme.npz")


def embeddings():
    classes, views, *_ = (int(v) for v in ARRAYS["lidar_hp"])
    return ARRAYS["lidar_E"].reshape(classes, views, -1)


def test_the_peers_number():
    _, _, delta, eps = ARRAYS["lidar_hp"]
    assert lidar(embeddings(), delta, eps) == pytest.approx(float(ARRAYS["lidar_f64"]), rel=1e-9)


def test_noise_between_views_does_not_count():
    generator = torch.Generator().manual_seed(0)
    means = torch.zeros(100, 1, 8)
    means[:, :, :3] = torch.randn(100, 1, 3, generator=generator)
    noise = 0.05 * torch.randn(100, 20, 8, generator=generator)
    assert lidar(means + noise) == pytest.approx(3, abs=0.3)


def test_rotation_and_order_change_nothing():
    Z = torch.tensor(embeddings())
    Q = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert lidar(Z @ Q) == pytest.approx(lidar(Z), rel=1e-9)
    assert lidar(Z.flip(0).flip(1)) == pytest.approx(lidar(Z), rel=1e-9)
    few = lidar(Z[:3])
    assert 1 <= few <= 2.01


@pytest.mark.parametrize(
    ("Z", "message"),
    [
        (np.ones((4, 3)), "expected"),
        (np.ones((4, 1, 3)), "two views"),
        (np.ones((4, 2, 3)), "same mean"),
        (np.full((4, 2, 3), np.nan), "NaN"),
    ],
)
def test_bad_embeddings(Z, message):
    with pytest.raises(InputError, match=message):
        lidar(Z)


@pytest.mark.parametrize("alpha", [1.8, 2.5, 4.0])
def test_a_power_law_is_found_again(alpha):
    generator = np.random.default_rng(0)
    tail = generator.uniform(size=3000) ** (-1 / (alpha - 1))
    fit = heavy_tail_alpha(np.sqrt(tail), input="singular_values")
    assert abs(fit.alpha - alpha) < 4 * fit.error
    scaled = heavy_tail_alpha(1e3 * np.sqrt(tail), input="singular_values")
    assert scaled.alpha == pytest.approx(fit.alpha, rel=1e-9)
    assert scaled.start == pytest.approx(1e6 * fit.start, rel=1e-9)


def test_a_bulk_below_the_tail_is_left_out():
    generator = np.random.default_rng(0)
    tail = 10 * generator.uniform(size=400) ** (-1 / 1.5)
    bulk = generator.uniform(0.1, 10, size=1200)
    fit = heavy_tail_alpha(np.sqrt(np.concatenate([tail, bulk])), input="singular_values")
    assert abs(fit.alpha - 2.5) < 0.3
    assert 200 <= fit.count <= 600
    spectrum = Spectrum(np.sqrt(np.concatenate([tail, bulk])))
    assert spectrum.heavy_tail_alpha == pytest.approx(fit.alpha)


def test_random_weights_have_no_heavy_tail():
    W = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    assert heavy_tail_alpha(W).alpha > 5


def test_too_few_values():
    with pytest.raises(InputError, match="at least 5"):
        heavy_tail_alpha([3.0, 2.0, 1.0], input="singular_values")
    with pytest.raises(InputError, match="at least 5"):
        heavy_tail_alpha(np.zeros((8, 8)))
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((30, 30)))[0]
    with pytest.raises(InputError, match="1 different eigenvalues"):
        heavy_tail_alpha(rotation)
    assert np.isnan(Spectrum([2.0, 1.0]).heavy_tail_alpha)
