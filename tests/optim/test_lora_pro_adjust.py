"""The adjustment of LoRA's gradients: closest to the whole gradient, whatever X."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.core.errors import InputError
from fullrank.optim.lora_adjust import CHOICES, adjust_lora_grads


def problem(m, n, r, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return draw(r, n), draw(m, r), draw(m, n)


def grads(A, B, G, s):
    return s * B.mT @ G, s * G @ A.mT


def projector(columns):
    U, S, _ = torch.linalg.svd(columns, full_matrices=False)
    independent = U[:, S / S.amax() > 1e-10]
    return independent @ independent.T


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 20),
    n=st.integers(1, 20),
    r=st.integers(1, 6),
    s=st.sampled_from([0.5, 2.0, 16 / 6**0.5]),
    x=st.sampled_from(CHOICES),
    seed=st.integers(0, 999),
)
def test_the_step_is_the_projection_of_the_whole_gradient(m, n, r, s, x, seed):
    r = min(r, m, n)
    A, B, G = problem(m, n, r, seed)
    dA, dB = adjust_lora_grads(A, B, *grads(A, B, G, s), s, x)
    Ge = s * (B @ dA + dB @ A)
    P_B, P_A = projector(B), projector(A.T)
    expected = P_B @ G + G @ P_A - P_B @ G @ P_A
    # delta and the conditioning of random factors limit the agreement.
    worst = max(torch.linalg.cond(A), torch.linalg.cond(B)) ** 2
    scale = float(worst) * 1e-8 / min(A.square().sum(), B.square().sum()) + 1e-10
    assert (Ge - expected).norm() <= 10 * scale * G.norm() * max(1.0, float(worst))
    assert (G * Ge).sum() >= -1e-9 * G.norm() ** 2


@pytest.mark.parametrize(("m", "n"), [(12, 30), (30, 12), (17, 17), (9, 23)])
def test_no_step_of_the_factors_is_closer_to_the_gradient(m, n):
    s = 2.0
    A, B, G = problem(m, n, 4)
    g_A, g_B = grads(A, B, G, s)
    dA, dB = adjust_lora_grads(A, B, g_A, g_B, s)
    best = (s * (B @ dA + dB @ A) - G).norm()
    plain = s * (B @ g_A + g_B @ A)
    scaled = (plain * G).sum() / plain.norm() ** 2 * plain
    assert best < (scaled - G).norm()
    for seed in range(10):
        _, other_B, _ = problem(m, n, 4, seed + 50)
        other_A, _, _ = problem(m, n, 4, seed + 90)
        near_A, near_B = dA + 0.1 * other_A, dB + 0.1 * other_B
        assert best <= (s * (B @ near_A + near_B @ A) - G).norm()


def test_sylvester_is_nearest_to_the_plain_gradients():
    A, B, G = problem(14, 9, 3)
    g_A, g_B = grads(A, B, G, 2.0)

    def distance(x):
        dA, dB = adjust_lora_grads(A, B, g_A, g_B, 2.0, x)
        return (dA - g_A).square().sum() + (dB - g_B).square().sum()

    assert distance("sylvester") < min(distance("zero"), distance("symmetry"))


def test_symmetry_shares_the_overlap_equally():
    s = 2.0
    A, B, G = problem(14, 9, 3)
    dA, dB = adjust_lora_grads(A, B, *grads(A, B, G, s), s, "symmetry")
    P_B, P_A = projector(B), projector(A.T)
    overlap = P_B @ G @ P_A
    torch.testing.assert_close(s * B @ dA, P_B @ G - overlap / 2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s * dB @ A, G @ P_A - overlap / 2, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("x", CHOICES)
def test_b_of_zeros_gets_the_projected_gradient_and_a_rests(x):
    A, B, G = problem(10, 16, 4)
    B.zero_()
    dA, dB = adjust_lora_grads(A, B, *grads(A, B, G, 2.0), 2.0, x)
    assert torch.equal(dA, torch.zeros_like(dA))
    expected = 2.0**-2 * (2.0 * G @ A.T) @ torch.linalg.inv(A @ A.T + 1e-8 * torch.eye(4))
    torch.testing.assert_close(dB, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("x", CHOICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_deficient_factors_stay_finite_and_their_null_space_rests(x, dtype):
    A, B, G = problem(10, 16, 4, dtype=dtype)
    A[3], B[:, 3] = 0, 0
    dA, dB = adjust_lora_grads(A, B, *grads(A, B, G, 2.0), 2.0, x)
    assert torch.isfinite(dA).all()
    assert torch.isfinite(dB).all()
    lean_A, lean_B = A[:3], B[:, :3]
    lean = adjust_lora_grads(lean_A, lean_B, *grads(lean_A, lean_B, G, 2.0), 2.0, x)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    torch.testing.assert_close(
        B @ dA + dB @ A, lean_B @ lean[0] + lean[1] @ lean_A, rtol=tolerance, atol=tolerance
    )
    assert dB[:, 3].abs().max() < tolerance


def test_both_factors_zero():
    A, B, G = problem(6, 5, 2)
    A.zero_()
    B.zero_()
    for found in adjust_lora_grads(A, B, *grads(A, B, G, 1.0), 1.0):
        assert torch.equal(found, torch.zeros_like(found))


def test_zero_gradients_give_zero():
    A, B, _ = problem(6, 5, 2)
    for found in adjust_lora_grads(A, B, torch.zeros_like(A), torch.zeros_like(B), 1.0):
        assert not found.any()


def test_float32_follows_float64_also_when_b_is_tiny():
    A, B, G = problem(40, 30, 4)
    for size in (1.0, 1e-3, 1e-6):
        wide = adjust_lora_grads(A, size * B, *grads(A, size * B, G, 2.0), 2.0)
        narrow = (t.float() for t in (A, size * B, *grads(A, size * B, G, 2.0)))
        for found, expected in zip(adjust_lora_grads(*narrow, 2.0), wide, strict=True):
            assert found.dtype == torch.float32
            assert (found - expected).norm() < 2e-5 * expected.norm()


def test_half_precision_and_odd_strides():
    A, B, G = problem(12, 10, 3)
    g_A, g_B = grads(A, B, G, 2.0)
    expected = adjust_lora_grads(A, B, g_A, g_B, 2.0)
    turned = (t.T.contiguous().T for t in (A, B, g_A, g_B))
    for found, plain in zip(adjust_lora_grads(*turned, 2.0), expected, strict=True):
        torch.testing.assert_close(found, plain)
    half = adjust_lora_grads(*(t.bfloat16() for t in (A, B, g_A, g_B)), 2.0)
    for found, plain in zip(half, expected, strict=True):
        assert found.dtype == torch.bfloat16
        assert (found - plain).norm() < 0.05 * plain.norm()


def test_a_stack_of_pairs_equals_one_at_a_time():
    problems = [problem(7, 11, 3, seed) for seed in range(4)]
    one = [adjust_lora_grads(A, B, *grads(A, B, G, 2.0), 2.0) for A, B, G in problems]
    A, B, G = (torch.stack(each) for each in zip(*problems, strict=True))
    dA, dB = adjust_lora_grads(A, B, *grads(A, B, G, 2.0), 2.0)
    torch.testing.assert_close(dA, torch.stack([each[0] for each in one]))
    torch.testing.assert_close(dB, torch.stack([each[1] for each in one]))


def test_relative_delta_damps_by_size():
    A, B, G = problem(12, 10, 3)
    tiny = 1e-8 * B
    found = adjust_lora_grads(A, tiny, *grads(A, tiny, G, 1.0), 1.0, "zero", relative_delta=True)
    P_B = projector(B)
    torch.testing.assert_close(tiny @ found[0], P_B @ G, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"A": torch.zeros(3, 5)}, "expected"),
        ({"A": torch.zeros(5)}, "expected"),
        ({"g_A": torch.zeros(2, 4)}, "gradients of shape"),
        ({"x": "best"}, "x='best'"),
        ({"scaling": 0.0}, "scaling=0"),
        ({"scaling": float("nan")}, "scaling"),
        ({"delta": -1.0}, "delta"),
        ({"A": torch.zeros(2, 5, dtype=torch.complex64)}, "real"),
    ],
)
def test_bad_input(change, says):
    good = {
        "A": torch.zeros(2, 5),
        "B": torch.zeros(4, 2),
        "g_A": torch.zeros(2, 5),
        "g_B": torch.zeros(4, 2),
        "scaling": 1.0,
    }
    with pytest.raises(InputError, match=says):
        adjust_lora_grads(**{**good, **change})
