"""The randomisation test against enumeration, and Holm's correction by hand."""

import itertools

import numpy as np
import pytest

from fullrank.core import InputError
from fullrank.evaluate import holm, randomisation_test, significance
from fullrank.evaluate.significance import column_p_values


def by_enumeration(a, b, clusters=None):
    difference = np.asarray(a) - np.asarray(b)
    labels = np.arange(len(difference)) if clusters is None else np.asarray(clusters)
    names, codes = np.unique(labels, return_inverse=True)
    observed = abs(difference.mean())
    reached = [
        abs((np.array(signs)[codes] * difference).mean()) >= observed - 1e-12
        for signs in itertools.product([1, -1], repeat=len(names))
    ]
    return np.mean(reached)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("seed", range(4))
def test_small_samples_are_exact(n, seed):
    rng = np.random.default_rng(seed)
    # Few distinct values: ties with the observed difference must count.
    a, b = rng.integers(0, 5, size=(2, n)) / 4
    assert randomisation_test(a, b) == pytest.approx(by_enumeration(a, b), abs=1e-12)


def test_clusters_are_swapped_as_one():
    rng = np.random.default_rng(5)
    a, b = rng.random((2, 24))
    clusters = np.repeat(list("abcdefgh"), 3).tolist()
    assert randomisation_test(a, b, clusters=clusters) == by_enumeration(a, b, clusters)
    assert randomisation_test([1.0, 1.0], [0.0, 0.0], clusters=["a", "a"]) == 1.0


def test_many_queries_are_sampled_close_to_the_exact_value():
    rng = np.random.default_rng(6)
    a = rng.random(16)
    b = a - rng.normal(0.02, 0.05, size=16)
    exact = randomisation_test(a, b, permutations=2**15)
    assert exact == pytest.approx(by_enumeration(a, b), abs=1e-12)
    sampled = randomisation_test(a, b, permutations=20_000)
    assert sampled != exact
    assert sampled == pytest.approx(exact, abs=0.01)


def test_the_smallest_value_is_one_in_the_number_of_swaps_and_itself():
    a, b = np.ones(100), np.zeros(100)
    assert randomisation_test(a, b, permutations=999) == 1 / 1000
    assert randomisation_test(b, a, permutations=999) == 1 / 1000


def test_equal_systems():
    values = np.random.default_rng(7).random(50)
    assert randomisation_test(values, values) == 1.0


def test_uniform_under_the_null_hypothesis():
    columns = np.random.default_rng(8).normal(size=(60, 400))
    p = np.array(column_p_values(columns, permutations=500))
    assert np.mean(p <= 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(p <= 0.5) == pytest.approx(0.5, abs=0.08)


def test_seeds_chunks_and_blocks(monkeypatch):
    columns = np.random.default_rng(9).normal(0.05, 1, size=(40, 70))
    first = column_p_values(columns, permutations=300, seed=1)
    assert first == column_p_values(columns, permutations=300, seed=1)
    assert first != column_p_values(columns, permutations=300, seed=2)
    assert first[69] == column_p_values(columns[:, 69:], permutations=300, seed=1)[0]
    monkeypatch.setattr(significance, "_SIGNS_AT_ONCE", 1)
    assert first == column_p_values(columns, permutations=300, seed=1)


def test_exact_and_sampled_columns_keep_their_places():
    columns = np.random.default_rng(10).normal(0.3, 1, size=(30, 3))
    columns[4:, 1] = 0.0
    columns[:4, 1] = 1.0
    p = column_p_values(columns, permutations=100)
    assert p[1] == 2 / 2**4
    assert [p[0], p[2]] == column_p_values(columns[:, [0, 2]], permutations=100)


@pytest.mark.parametrize(
    ("a", "b", "options", "says"),
    [
        ([], [], {}, "one value a query"),
        ([1.0, 2.0], [1.0], {}, "of one length"),
        ([1.0, float("nan")], [1.0, 2.0], {}, "first values hold nan"),
        ([1.0, 2.0], [1.0, float("inf")], {}, "second values hold inf"),
        ([1.0, 2.0], [1.0, 2.0], {"clusters": ["a"]}, "1 clusters for 2"),
        ([1.0, 2.0], [1.0, 2.0], {"permutations": 0}, "0 permutations"),
    ],
)
def test_bad_input(a, b, options, says):
    with pytest.raises(InputError, match=says):
        randomisation_test(a, b, **options)


def test_holm_by_hand():
    # 0.01 x 4; 0.015 x 3; 0.02 x 2 is less than the one before; 0.9 x 1.
    assert holm([0.02, 0.01, 0.9, 0.015]) == pytest.approx([0.045, 0.04, 0.9, 0.045])
    assert holm([0.6, 0.4]) == pytest.approx([0.8, 0.8])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([0.3]) == [0.3]
    assert holm([]) == []


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_holm_refuses_what_is_no_p_value(p):
    with pytest.raises(InputError, match=r"lie in \[0, 1\]"):
        holm([0.5, p])
