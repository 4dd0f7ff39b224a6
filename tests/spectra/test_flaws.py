"""Dead and duplicated directions: planted ones are found, and nothing else."""

import pytest
import torch

from fullrank.spectra import Spectrum
from fullrank.spectra.flaws import PARALLEL, find_flaws, parallels


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(60, 40)


def flaws(matrix, **options):
    return find_flaws(matrix, Spectrum(matrix), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_random_matrix_has_none(weight, dtype):
    assert not flaws(weight.to(dtype)).any


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
def test_missing_rank_is_dead_whatever_rounding_left_of_it(dtype, shape):
    torch.manual_seed(1)
    m, n = shape
    full = torch.randn(m, 31, dtype=torch.float64) @ torch.randn(31, n, dtype=torch.float64)
    found = flaws(full.to(dtype))
    # Rounding leaves values around the floor: the largest of them may stand just above it.
    assert 7 <= found.dead <= 9
    assert not found.rows.count
    assert not found.columns.count


def test_of_two_factors_only_the_stored_rank_counts():
    torch.manual_seed(2)
    product = torch.randn(30, 5) @ torch.randn(5, 20)
    assert flaws(product).dead == 15
    assert flaws(product, rank=5).dead == 0
    assert flaws(product, rank=6).dead == 1


def test_repeated_opposite_and_zero_rows_and_columns(weight):
    weight[7] = 2.5 * weight[3]
    weight[11] = -0.1 * weight[3]
    weight[:, 9] = weight[:, 2] + 1e-4 * torch.randn(60)
    weight[20] = 0
    found = flaws(weight)
    assert (found.rows.count, found.rows.zeros) == (2, 1)
    assert found.rows.examples == ((3, 7), (3, 11))
    assert (found.columns.count, found.columns.zeros) == (1, 0)
    assert found.columns.examples == ((2, 9),)
    assert found.any


def test_the_limit_is_that_of_the_cosine():
    direction, other = torch.eye(40)[:2]
    for cosine, count in ((PARALLEL + 2e-4, 1), (PARALLEL - 2e-4, 0)):
        near = cosine * direction + (1 - cosine**2) ** 0.5 * other
        assert parallels(torch.stack([direction, near])).count == count


def test_agrees_with_all_cosines_over_many_chunks():
    torch.manual_seed(3)
    rows = torch.randn(1300, 64)
    for later, earlier in ((700, 3), (1299, 600), (512, 511), (1024, 0)):
        rows[later] = rows[earlier] * (-1) ** later + 0.01 * torch.randn(64)
    units = torch.nn.functional.normalize(rows)
    expected = ((units @ units.T).abs().tril(-1) >= PARALLEL).any(1).sum()
    assert expected == 4
    found = parallels(rows)
    assert found.count == 4
    assert found.examples == ((511, 512), (3, 700), (0, 1024))


def test_a_matrix_of_one_row_repeated_and_of_zeros():
    same = torch.ones(600, 40)
    assert parallels(same).count == 599
    assert flaws(same).dead == 39
    zeros = flaws(torch.zeros(12, 10))
    assert (zeros.dead, zeros.rows.zeros, zeros.columns.zeros) == (10, 12, 10)


def test_short_rows_are_not_compared():
    assert parallels(torch.ones(5, 3)).count == 0


def test_not_contiguous(weight):
    assert parallels(weight.T).count == parallels(weight.T.contiguous()).count == 0
