"""The Sylvester equation."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.linalg import solve_sylvester
from fullrank.linalg.sylvester import solve_diagonalised


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 8), n=st.integers(1, 8), seed=st.integers(0, 999))
def test_symmetric_equations(m, n, seed):
    left, right = random(m + 2, m, seed=seed), random(n + 2, n, seed=seed + 1)
    A, B = left.T @ left, right.T @ right
    C = random(m, n, seed=seed + 2)
    X = solve_sylvester(A, B, C)
    torch.testing.assert_close(A @ X + X @ B, C, rtol=1e-6, atol=1e-6)


def test_general_equations():
    A, B, C = random(5, 5) + 4 * torch.eye(5), random(3, 3, seed=1) + 4 * torch.eye(3), random(5, 3)
    X = solve_sylvester(A, B, C)
    torch.testing.assert_close(A @ X + X @ B, C)


def test_one_side_may_be_zero():
    A = random(6, 4)
    X = solve_sylvester(A.T @ A, torch.zeros(2, 2), random(4, 2, seed=1))
    torch.testing.assert_close(A.T @ A @ X, random(4, 2, seed=1))


def test_the_result_has_the_right_hand_sides_dtype():
    assert solve_sylvester(torch.eye(2), torch.eye(2), torch.ones(2, 2).bfloat16()).dtype is (
        torch.bfloat16
    )


def test_singular_equations_raise_or_give_the_smallest_least_squares_solution():
    A, B, C = torch.diag(torch.tensor([1.0, 0.0])), torch.zeros(1, 1), torch.tensor([[3.0], [5.0]])
    with pytest.raises(ValueError, match="singular"):
        solve_sylvester(A, B, C)
    assert solve_sylvester(A, B, C, rtol=1e-9).tolist() == [[3.0], [0.0]]
    nilpotent = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="singular"):
        solve_sylvester(nilpotent, nilpotent, torch.ones(2, 2))
    with pytest.raises(ValueError, match="symmetric"):
        solve_sylvester(nilpotent, nilpotent, torch.ones(2, 2), rtol=0.1)


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (((2, 3), (2, 2), (2, 2)), "expected"),
        (((2, 2), (3, 3), (2, 2)), "expected"),
        (((2,), (2, 2), (2, 2)), "left matrix"),
    ],
)
def test_shapes_that_do_not_fit(shapes, says):
    with pytest.raises(ValueError, match=says):
        solve_sylvester(*(torch.ones(shape) for shape in shapes))


def test_large_general_equations_are_refused():
    A = random(80, 80)
    with pytest.raises(ValueError, match="unknowns"):
        solve_sylvester(A, A, random(80, 80, seed=1))


def test_stacks_of_diagonalised_equations():
    grams = [random(6, 3, seed=seed) for seed in range(4)]
    A, B = (torch.stack([M.T @ M for M in pair]) for pair in (grams[:2], grams[2:]))
    C = random(2, 3, 3, seed=9)
    X = solve_diagonalised(*torch.linalg.eigh(A), *torch.linalg.eigh(B), C, rtol=1e-14)
    torch.testing.assert_close(A @ X + X @ B, C, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(X[0], solve_sylvester(A[0], B[0], C[0]), rtol=1e-8, atol=1e-8)


def test_each_equation_of_a_stack_has_its_own_null_space():
    one = torch.ones(2, 1, 1, dtype=torch.float64)
    left = torch.tensor([[1.0], [1e-20]], dtype=torch.float64)
    zero = torch.zeros(2, 1, dtype=torch.float64)
    X = solve_diagonalised(left, one, zero, one, 3e-20 * one, rtol=1e-14)
    assert X.flatten().tolist() == pytest.approx([3e-20, 3.0], rel=1e-12)
    empty = solve_diagonalised(zero, one, zero, one, one, rtol=1e-14)
    assert not empty.any()
