"""Running inverses: positive definite, equal in both forms, pulled to the identity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.core.errors import InputError
from fullrank.optim import mkor_factors
from fullrank.optim.mkor_factors import (
    Columns,
    Dense,
    InverseFactor,
    products_that_count,
    sm_update,
)

YES, NO = torch.tensor(True), torch.tensor(False)
CPU = torch.device("cpu")


def factor(dim, thin, dtype=torch.float64, rule="official", blend=0.95):
    made = InverseFactor(dim, rule, blend, dtype, CPU, dense=not thin)
    assert isinstance(made.form, Columns if thin else Dense)
    return made


@settings(max_examples=30, deadline=None)
@given(d=st.integers(1, 12), blend=st.floats(0.5, 0.999), seed=st.integers(0, 999))
def test_update_is_the_inverse_it_says(d, blend, seed):
    torch.manual_seed(seed)
    A = torch.randn(d, d, dtype=torch.float64)
    J = torch.linalg.inv(A @ A.T + torch.eye(d, dtype=torch.float64))
    v = torch.randn(d, dtype=torch.float64)
    mixed = blend * J + (1 - blend) * torch.eye(d, dtype=torch.float64)
    outer = torch.outer(v, v)
    expected = torch.linalg.inv(torch.linalg.inv(mixed) + outer)
    torch.testing.assert_close(sm_update(J, v, blend=blend), expected, rtol=1e-8, atol=1e-10)
    expected = torch.linalg.inv(blend * torch.linalg.inv(J) + (1 - blend) * outer)
    torch.testing.assert_close(sm_update(J, v, "ema", blend), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_thousand_updates_stay_positive_definite(dtype):
    torch.manual_seed(1)
    J = torch.eye(8, dtype=dtype)
    for t in range(10_000):
        J = sm_update(J, torch.randn(8, dtype=dtype) * (100.0 if t % 7 == 0 else 1.0))
    assert torch.equal(J, J.T)
    eigenvalues = torch.linalg.eigvalsh(J)
    assert eigenvalues.min() > 0
    assert eigenvalues.max() <= 1 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [65, 100, 401])
def test_columns_equal_the_matrix(dim, dtype):
    torch.manual_seed(2)
    # At this blend 79 columns are above float32's rounding, 169 above float64's.
    thin, full = (factor(dim, kind, dtype, blend=0.8) for kind in (True, False))
    G = torch.randn(dim, 7, dtype=dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    # Past the number of columns that is kept, or past the turn to a matrix.
    for _ in range(190):
        v = torch.randn(dim, dtype=dtype) * 3
        thin.update(v, YES, NO, 0.9)
        full.update(v, YES, NO, 0.9)
    assert isinstance(thin.form, Columns) is (dim == 401)
    torch.testing.assert_close(thin.form.matrix(), full.form.matrix(), rtol=0, atol=tolerance)
    for one, other in (
        (thin.form.left(G), full.form.left(G)),
        (thin.form.right(G.T), full.form.right(G.T)),
        (thin.form.times(G[:, 0]), full.form.times(G[:, 0])),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=10 * tolerance)


def test_the_oldest_column_is_overwritten():
    # Half the side is more than what float32 can tell apart.
    most = products_that_count(0.8, torch.float32)
    made = factor(2 * most + 2, True, torch.float32, blend=0.8)
    for _ in range(most + 30):
        made.update(torch.randn(2 * most + 2), YES, NO, 0.9)
    assert made.form.w.shape == (most, 2 * most + 2)
    assert made.form.next == 30
    assert 0 < made.form.c.min() < torch.finfo(torch.float32).eps


@pytest.mark.parametrize("thin", [False, True])
def test_pull_and_refusal(thin):
    made = factor(100, thin)
    for _ in range(5):
        made.update(torch.randn(100, dtype=torch.float64), YES, NO, 0.9)
    before = made.form.matrix().clone()
    made.update(torch.full((100,), torch.nan, dtype=torch.float64), NO, NO, 0.9)
    torch.testing.assert_close(made.form.matrix(), before)
    made.update(torch.randn(100, dtype=torch.float64), YES, YES, 0.9)
    expected = 0.9 * before + 0.1 * torch.eye(100, dtype=torch.float64)
    torch.testing.assert_close(made.form.matrix(), expected)


def test_ema_grows_where_nothing_comes():
    made = factor(4, False, rule="ema", blend=0.9)
    v = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    for _ in range(8):
        made.update(v, YES, NO, 0.9)
    assert float(made.largest()) == pytest.approx(0.9**-8)


def test_half_precision_stores_and_computes_apart(monkeypatch):
    monkeypatch.setattr(mkor_factors, "_SMALL", 4)
    torch.manual_seed(3)
    vectors = [torch.randn(40) * 200 for _ in range(30)]  # v^T v is beyond float16
    for thin in (True, False):
        half, full = factor(40, thin, torch.float16), factor(40, thin, torch.float32)
        for v in vectors:
            half.update(v, YES, NO, 0.9)
            full.update(v, YES, NO, 0.9)
        assert torch.isfinite(half.form.matrix()).all()
        torch.testing.assert_close(half.form.matrix(), full.form.matrix(), rtol=0, atol=2e-2)


@pytest.mark.parametrize(
    ("J", "v", "options", "match"),
    [
        (torch.eye(3), torch.ones(2), {}, "shape"),
        (torch.ones(2, 3), torch.ones(3), {}, "shape"),
        (torch.eye(3), torch.ones(3), {"rule": "paper"}, "rule"),
        (torch.eye(3), torch.ones(3), {"blend": 0.0}, "blend"),
        (torch.eye(3), torch.ones(3), {"blend": 1.5}, "blend"),
    ],
)
def test_invalid_updates_raise(J, v, options, match):
    with pytest.raises(InputError, match=match):
        sm_update(J, v, **options)
