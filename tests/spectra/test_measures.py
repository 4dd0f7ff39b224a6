"""Effective, stable and energy ranks: definitions, invariances, parity, bad input."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.core.errors import InputError
from fullrank.spectra import (
    Spectrum,
    effective_rank,
    energy_rank,
    nuclear_norm,
    participation_ratio,
    stable_rank,
)

REFERENCE = Path(__file__).parents[1] / "reference"
MEASURES = {
    "effective_rank": effective_rank,
    "stable_rank": stable_rank,
    "participation_ratio": participation_ratio,
    "energy_rank": energy_rank,
    "nuclear_norm": nuclear_norm,
}


def matrices():
    return st.builds(
        lambda m, n, seed: torch.randn(
            m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ),
        st.integers(1, 12),
        st.integers(1, 12),
        st.integers(0, 999),
    )


@settings(max_examples=50, deadline=None)
@given(A=matrices(), scale=st.floats(1e-150, 1e150), seed=st.integers(0, 99))
def test_ranks_are_invariant_to_scale_rotation_permutation_and_transposition(A, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(
        torch.randn(A.shape[1], A.shape[1], generator=generator, dtype=torch.float64)
    )[0]
    rows = torch.randperm(A.shape[0], generator=generator)
    for name, measure in MEASURES.items():
        if name == "nuclear_norm":
            scale = 1.0
        value = measure(A)
        for changed in (A * scale, A @ turn, A[rows], A.T):
            assert measure(changed) == pytest.approx(value, rel=1e-8), name


@settings(max_examples=50, deadline=None)
@given(A=matrices())
def test_ranks_lie_between_one_and_the_smaller_side(A):
    for name in ("effective_rank", "stable_rank", "participation_ratio", "energy_rank"):
        assert 1 - 1e-9 <= MEASURES[name](A) <= min(A.shape) + 1e-9
    assert stable_rank(A) <= participation_ratio(A) * (1 + 1e-9)


@settings(max_examples=50, deadline=None)
@given(values=st.lists(st.floats(0, 1e3), min_size=1, max_size=12), tau=st.floats(0.01, 1))
def test_a_spectrum_agrees_with_the_functions(values, tau):
    spectrum = Spectrum(values)
    given = {"input": "singular_values"}
    assert spectrum.effective_rank == pytest.approx(effective_rank(values, **given))
    assert spectrum.stable_rank == pytest.approx(stable_rank(values, **given))
    assert spectrum.nuclear_norm == pytest.approx(nuclear_norm(values, **given))
    assert spectrum.participation_ratio == pytest.approx(participation_ratio(values, **given))
    assert abs(spectrum.energy_rank(tau) - energy_rank(values, tau, **given)) <= 1


def test_definitions_by_hand():
    values = [4.0, 2.0, 2.0]
    given = {"input": "singular_values"}
    p = np.array([0.5, 0.25, 0.25])
    assert effective_rank(values, **given) == pytest.approx(math.exp(-(p * np.log(p)).sum()))
    assert stable_rank(values, **given) == 24 / 16
    assert nuclear_norm(values, **given) == 8
    assert participation_ratio(values, **given) == pytest.approx(24**2 / (256 + 16 + 16))
    assert [energy_rank(values, t, **given) for t in (0.5, 0.8, 0.9, 1.0)] == [1, 2, 3, 3]


def test_orthonormal_columns_and_rank_one():
    Q = torch.linalg.qr(torch.randn(20, 6, generator=torch.Generator().manual_seed(0)))[0]
    assert effective_rank(Q) == pytest.approx(6, rel=1e-6)
    assert effective_rank(torch.ones(5, 4)) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_zero_is_of_rank_zero(measure):
    assert measure(torch.zeros(4, 3)) == 0
    assert measure([0.0, 0.0], input="singular_values") == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_measured_in_float64(dtype):
    A = torch.randn(9, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert effective_rank(A) == effective_rank(A.double())


def test_arrays_strides_and_gradients():
    A = torch.randn(8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = effective_rank(A[::2, ::3])
    assert effective_rank(A.numpy()[::2, ::3]) == pytest.approx(value)
    assert effective_rank(A[::2, ::3].clone().requires_grad_()) == pytest.approx(value)


@pytest.mark.parametrize("case", ["case_b_wide", "case_c_truncated"])
def test_batches_of_masked_centred_matrices_match_the_reference(case):
    with np.load(REFERENCE / "verl" / f"{case}.npz") as data:
        hidden, mask, expected = data["hidden"], data["mask"], data["er_f64"]
    found = effective_rank(hidden, center=True, eps=1e-8, eps_in="log", mask=mask)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    single = effective_rank(
        hidden[0, 0][mask[0, 0].astype(bool)], center=True, eps=1e-8, eps_in="log"
    )
    assert single == pytest.approx(expected[0, 0], abs=1e-5)


@pytest.mark.parametrize(
    ("x", "options", "says"),
    [
        (torch.ones(5), {}, "two dimensions"),
        (torch.ones(0, 5), {}, "empty"),
        (torch.ones(5, 5, dtype=torch.int64), {}, "floating-point"),
        (np.ones((5, 5), dtype=np.int64), {}, "floating-point"),
        (np.ones((5, 5), dtype=complex), {}, "real"),
        (torch.tensor([[1.0, float("nan")]]), {}, "NaN"),
        ([1.0, -1.0], {"input": "singular_values"}, "none is negative"),
        ([1.0, 1.0], {"input": "singular_values", "center": True}, "need a matrix"),
        (torch.ones(5, 5), {"input": "values"}, "'matrix' or 'singular_values'"),
        (torch.ones(5, 5), {"eps_in": "sum"}, "eps_in"),
        (torch.ones(5, 5), {"eps": -1.0}, "negative"),
        (torch.ones(5, 5), {"mask": torch.ones(4)}, "the mask has shape"),
    ],
)
def test_bad_input_is_named(x, options, says):
    with pytest.raises(InputError, match=says):
        effective_rank(x, **options)


@pytest.mark.parametrize("tau", [0, -0.1, 1.1, math.nan])
def test_a_share_of_energy_lies_in_0_1(tau):
    with pytest.raises(InputError, match="share of energy"):
        energy_rank(torch.ones(2, 2), tau)
    with pytest.raises(InputError, match="share of energy"):
        Spectrum([1.0]).energy_rank(tau)


def test_a_spectrum_is_sorted_hashable_and_read_only():
    spectrum = Spectrum([1.0, 3.0, 2.0])
    assert spectrum.values.tolist() == [3, 2, 1]
    assert spectrum == Spectrum(torch.diag(torch.tensor([2.0, 3.0, 1.0])))
    assert hash(spectrum) == hash(Spectrum([3.0, 2.0, 1.0]))
    assert len(spectrum) == 3
    assert "effective rank" in repr(spectrum)
    with pytest.raises(ValueError, match="read-only"):
        spectrum.values[0] = 1
    assert spectrum.energy[-1] == 1
    assert spectrum.frobenius_norm == pytest.approx(math.sqrt(14))
    with pytest.raises(InputError, match="matrix or a vector"):
        Spectrum(torch.ones(2, 2, 2))


def test_extreme_singular_values():
    assert effective_rank([1e308] * 20, input="singular_values") == pytest.approx(20)
    assert effective_rank([1e308] * 20, input="singular_values", eps=1e-8, eps_in="log") == (
        pytest.approx(20, rel=1e-5)
    )
    spectrum = Spectrum([3e200, 4e200], missed=1.0)
    assert spectrum.frobenius_norm == pytest.approx(5e200)


def test_short_names_of_a_spectrum():
    spectrum = Spectrum([3.0, 4.0])
    assert spectrum.singular_values is spectrum.values
    assert (spectrum.nuclear, spectrum.frobenius) == (7.0, 5.0)
