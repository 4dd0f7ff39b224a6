"""Semi-NMF: parity, monotone error, and as a solver of `split`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.compress import Fixed, factorize, make_plan, semi_nmf, split
from fullrank.compress.solvers import decompose
from fullrank.core.errors import InputError

REFERENCE = Path(__file__).parents[1] / "reference" / "greenformers"


@pytest.mark.parametrize("case", [0, 1])
def test_parity(case):
    with np.load(REFERENCE / f"snmf_{case}.npz") as file:
        found = {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}
    rank, steps = int(found["rank"]), int(found["num_iter"])
    F, H = semi_nmf(found["W"].T, rank, steps, start=found["H0"])
    torch.testing.assert_close(F, found["Wf"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(H, found["Hf"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((F @ H).T, found["BA"], rtol=1e-9, atol=1e-12)
    error = (found["W"].T - F @ H).norm()
    torch.testing.assert_close(error, found["err"], rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (7, 7), (1, 5)])
def test_the_error_never_rises_and_the_optimum_is_not_beaten(shape):
    X = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rank = max(1, min(shape) // 2)
    errors = []
    for steps in (1, 2, 5, 20, 100):
        F, H = semi_nmf(X, rank, steps)
        assert (H >= 0).all()
        errors.append(float((X - F @ H).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] >= float(torch.linalg.svdvals(X)[rank:].norm()) - 1e-12


def test_equal_rows_of_the_start_are_no_obstacle():
    F, H = semi_nmf(torch.randn(6, 8), 3, start=torch.ones(3, 8))
    assert torch.isfinite(F @ H).all()


def test_as_a_solver():
    W = torch.randn(12, 20, generator=torch.Generator().manual_seed(2))
    factors = split(W, 4, "snmf")
    assert factors.first.shape == (4, 20)
    assert (factors.second >= 0).all()
    lost = (W.double() - factors.second @ factors.first).square().sum() / W.square().sum()
    assert factors.error == pytest.approx(float(lost), rel=1e-6)
    even = split(W, 4, "snmf", "sqrt")
    torch.testing.assert_close(even.second @ even.first, factors.second @ factors.first)
    with pytest.raises(InputError, match="no order"):
        decompose(W, "snmf")


def test_in_a_model():
    model = nn.Sequential(nn.Linear(12, 20))
    plan = make_plan(model, Fixed(3), method="snmf")
    factorize(model, plan)
    assert model[0].rank == 3
    assert model[0].method == "snmf"


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 0},
        {"rank": 5},
        {"rank": 2, "iterations": 0},
        {"rank": 2, "start": torch.ones(3, 6)},
        {"rank": 2, "start": -torch.ones(2, 6)},
    ],
)
def test_bad_input(settings):
    with pytest.raises(InputError):
        semi_nmf(torch.randn(4, 6), **settings)


def test_a_matrix_that_is_not_finite():
    with pytest.raises(InputError, match="finite"):
        semi_nmf(torch.full((3, 3), torch.nan), 1)
