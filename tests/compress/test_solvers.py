"""Factor solvers: parity with the reference vectors, optimality, exactness, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullrank.compress import CalibrationStats, decompose, split
from fullrank.compress.calibration import LayerStats
from fullrank.core.errors import InputError
from fullrank.core.moments import Moments
from fullrank.core.plan import break_even

REFERENCE = Path(__file__).parents[1] / "reference" / "lord"


def stats_of(weight, x, side="input"):
    moments = Moments(weight.shape[1] if side == "input" else weight.shape[0])
    moments.update(x if side == "input" else x @ weight.T)
    return LayerStats(side, moments)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("case", ["afm_0", "afm_1", "afm_2"])
def test_output_pca_agrees_with_the_reference(case, side):
    z = {k: torch.from_numpy(v) for k, v in np.load(REFERENCE / f"{case}.npz").items()}
    W, X, bias = z["W"], z["X"], z["bias"]
    solved = decompose(W, "output_pca", stats_of(W, X, side))
    variance = z["cov_eigenvalues"].sum()
    assert torch.allclose(
        solved.loss[: len(solved.loss)],
        z["cov_eigenvalues"][: len(solved.loss)],
        rtol=1e-8,
        atol=1e-10,
    )
    for rank in map(int, z["ranks"]):
        f = solved.truncate(rank)
        torch.testing.assert_close(f.second @ f.first, z[f"BA_{rank}"], rtol=1e-8, atol=1e-8)
        merged = bias + f.bias_shift
        torch.testing.assert_close(merged, z[f"bias_merged_{rank}"], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(f.second @ f.second.T, z[f"P_{rank}"], rtol=1e-8, atol=1e-8)
        y = z["X_test"] @ f.first.T @ f.second.T + merged
        torch.testing.assert_close(y, z[f"y_test_{rank}"], rtol=1e-8, atol=1e-8)
        # Mean squared error on the calibration data: the sum of the dropped eigenvalues.
        error = f.error * variance
        torch.testing.assert_close(error, z[f"err_{rank}"], rtol=1e-8, atol=1e-9)
        y = X @ f.first.T @ f.second.T + merged
        measured = (y - X @ W.T - bias).square().sum(1).mean()
        torch.testing.assert_close(measured, z[f"err_{rank}"], rtol=1e-7, atol=1e-9)
        svd = split(W, rank)
        y = X @ (svd.second @ svd.first).T
        measured = (y - X @ W.T).square().sum(1).mean()
        torch.testing.assert_close(measured, z[f"err_weight_svd_{rank}"], rtol=1e-7, atol=1e-9)


def test_break_even_agrees_with_the_reference():
    for n, m, r, factors, dense, even in np.load(REFERENCE / "rank_params.npz")["table"]:
        assert r * (n + m) == factors
        assert n * m == dense
        assert (r <= break_even(int(m), int(n))) == (factors < dense)
        assert break_even(int(m), int(n)) == np.ceil(even) - 1


def gauss_newton_stats(layer, batches):
    stats = CalibrationStats({"fc": layer}, gradients=True)
    return stats.observe(nn.Sequential(layer, nn.Tanh()), batches, progress=False)["fc"]


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9), (1, 5), (5, 1)])
@pytest.mark.parametrize("method", ["svd", "output_pca", "gauss_newton"])
@pytest.mark.parametrize("balance", ["sqrt", "first", "second", "orthonormal_second"])
def test_full_rank_is_exact(shape, method, balance):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).double()
    batches = [torch.randn(50, shape[1], dtype=torch.float64) for _ in range(3)]
    stats = None if method == "svd" else gauss_newton_stats(layer, batches)
    f = split(layer.weight, min(shape), method, balance, stats)
    torch.testing.assert_close(f.second @ f.first, layer.weight.detach(), rtol=1e-9, atol=1e-10)
    assert f.error < 1e-12
    if f.bias_shift is not None:
        assert f.bias_shift.abs().max() < 1e-9


def test_balances_share_the_scale_as_they_say():
    torch.manual_seed(0)
    W = torch.randn(8, 6)
    norms = {
        b: (split(W, 4, "svd", b).first.norm(dim=1), split(W, 4, "svd", b).second.norm(dim=0))
        for b in ("sqrt", "first", "second", "orthonormal_second")
    }
    s = torch.linalg.svdvals(W.double())[:4]
    one = torch.ones(4, dtype=torch.float64)
    torch.testing.assert_close(norms["sqrt"], (s.sqrt(), s.sqrt()))
    torch.testing.assert_close(norms["first"], (s, one))
    torch.testing.assert_close(norms["second"], (one, s))
    torch.testing.assert_close(norms["orthonormal_second"], (s, one))


@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    data=st.data(),
)
def test_svd_is_the_best_of_its_rank(m, n, seed, dtype, data):
    rank = data.draw(st.integers(1, min(m, n)))
    g = torch.Generator().manual_seed(seed)
    # Not contiguous, odd shapes, any dtype.
    W = torch.randn(n, m, generator=g).to(dtype).T
    f = split(W, rank)
    s = torch.linalg.svdvals(W.double())
    lost = (W.double() - f.second @ f.first).square().sum()
    torch.testing.assert_close(lost, s[rank:].square().sum(), rtol=1e-6, atol=1e-10)
    assert f.first.dtype == torch.float64


@settings(max_examples=25, deadline=None)
@given(m=st.integers(2, 16), n=st.integers(2, 16), seed=st.integers(0, 10**6), data=st.data())
def test_output_pca_beats_svd_and_any_other_on_the_calibration_data(m, n, seed, data):
    rank = data.draw(st.integers(1, min(m, n)))
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(m, n, generator=g, dtype=torch.float64)
    X = torch.randn(60, n, generator=g, dtype=torch.float64) * torch.rand(n, generator=g) + 1.0
    for side in ("input", "output"):
        stats = stats_of(W, X, side)
        best = split(W, rank, "output_pca", stats=stats).error
        assert best <= split(W, rank, "svd", stats=stats).error + 1e-9
        other = torch.randn(m, rank, generator=g, dtype=torch.float64)
        P = other @ torch.linalg.pinv(other)
        C = stats.output_covariance(W)
        Q = torch.eye(m, dtype=torch.float64) - P
        assert best <= float((Q @ C @ Q).trace() / C.trace()) + 1e-9


def test_gauss_newton_predicts_and_beats_output_pca_where_directions_matter_unequally():
    torch.manual_seed(0)
    layer = nn.Linear(10, 8).double()
    read = torch.diag(torch.tensor([8.0, 8.0, 8.0] + [1.0] * 5, dtype=torch.float64))
    model = nn.Sequential(layer, nn.Linear(8, 8, bias=False).double())
    model[1].weight.data.copy_(read)
    x = torch.randn(4000, 10, dtype=torch.float64)
    stats = CalibrationStats({"fc": layer}, gradients=True)
    layer_stats = stats.observe(model, list(x.split(500)), progress=False)["fc"]
    wanted = model(x)

    def error_of(method):
        f = split(layer.weight, 3, method, stats=layer_stats)
        y = x @ f.first.T @ f.second.T + layer.bias + f.bias_shift
        return (y @ read.T - wanted).square().sum(1).mean().item()

    assert error_of("gauss_newton") < 0.5 * error_of("output_pca")
    solved = decompose(layer.weight, "gauss_newton", layer_stats)
    # A linear model: what is predicted is what happens, up to damping and sampling.
    assert error_of("gauss_newton") == pytest.approx(float(solved.loss[3:].sum()), rel=0.25)


def test_bad_input_is_named():
    W = torch.randn(4, 6)
    x = torch.randn(50, 6)
    good = stats_of(W, x)
    with pytest.raises(InputError, match="rank 5"):
        split(W, 5)
    with pytest.raises(InputError, match="rank 0"):
        split(W, 0)
    with pytest.raises(InputError, match="method 'pca'"):
        split(W, 2, "pca")
    with pytest.raises(InputError, match="balance 'even'"):
        split(W, 2, balance="even")
    with pytest.raises(InputError, match="needs calibration"):
        split(W, 2, "output_pca")
    with pytest.raises(InputError, match="NaN"):
        split(W * float("nan"), 2)
    with pytest.raises(InputError, match="another layer"):
        split(torch.randn(4, 7), 2, "output_pca", stats=good)
    with pytest.raises(InputError, match="no calibration data"):
        split(W, 2, "output_pca", stats=LayerStats("input", Moments(6)))
    with pytest.raises(InputError, match="never varies"):
        split(W, 2, "output_pca", stats=stats_of(W, torch.full((50, 6), 0.3)))
    with pytest.raises(InputError, match="gradients=True"):
        split(W, 2, "gauss_newton", stats=good)
    with pytest.raises(InputError, match="float matrix"):
        split(torch.zeros(4, 6, dtype=torch.int32), 2)


@pytest.mark.parametrize("method", ["svd", "snmf", "random"])
def test_a_weight_of_zero_has_no_error_that_is_no_number(method):
    factors = split(torch.zeros(6, 5), 2, method)
    assert factors.error == (pytest.approx(0.0) if method != "random" else factors.error)
    assert np.isfinite(factors.error)
    assert decompose(torch.zeros(6, 5)).truncate(2).error == 0


def test_random_factors_have_the_variance_of_a_new_layer():
    torch.manual_seed(0)
    factors = split(torch.ones(200, 300), 50, "random")
    assert factors.first.shape == (50, 300)
    product = factors.second @ factors.first
    assert product.var() == pytest.approx(1 / (3 * 300), rel=0.1)
    shared = split(torch.ones(200, 300), 50, "random", "sqrt")
    torch.testing.assert_close(shared.first.norm(dim=1), shared.second.norm(dim=0))
