"""Exact search against sorting everything."""

import numpy as np
import pytest

from fullrank.core import InputError
from fullrank.retrieval import ExactSearch, exact


def unit(rows, width, seed):
    x = np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def vectors():
    return unit(1000, 24, 0)


def check(vectors, queries, k):
    rows, scores = ExactSearch(vectors).top(queries, k)
    every = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    k = min(k, len(vectors))
    assert rows.shape == scores.shape == (len(queries), k)
    assert rows.dtype == np.int64
    assert scores.dtype == np.float32
    np.testing.assert_allclose(np.take_along_axis(every, rows, 1), scores, atol=1e-6)
    np.testing.assert_allclose(scores, -np.sort(-every, axis=1)[:, :k], atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert all(len(set(row)) == k for row in rows.tolist())


@pytest.mark.parametrize("count", [0, 1, 2, 4, 5, 300])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_finds_the_best(vectors, count, k):
    check(vectors, unit(count, 24, 1), k)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("block", [1, 64, 333, 1000])
def test_blocks_do_not_show(vectors, count, block, monkeypatch):
    monkeypatch.setattr(exact, "_VECTORS", block)
    monkeypatch.setattr(exact, "_QUERIES", 5)
    check(vectors, unit(count, 24, 2), 50)


def test_more_than_there_is(vectors):
    check(vectors, unit(3, 24, 3), 10_000)
    check(vectors[:1], unit(3, 24, 3), 5)


def test_a_memory_map(vectors, tmp_path):
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    rows, scores = ExactSearch(mapped).top(vectors[:6], 3)
    assert rows[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert type(scores) is np.ndarray
    assert len(ExactSearch(mapped)) == 1000


def test_bad_vectors(vectors):
    for bad in (vectors[0], vectors.astype(np.float64), vectors.tolist(), None, vectors[:0]):
        with pytest.raises(InputError):
            ExactSearch(bad)


def test_bad_queries(vectors):
    search = ExactSearch(vectors)
    with pytest.raises(InputError, match="dimension 23, expected 24"):
        search.top(unit(2, 23, 0), 5)
    with pytest.raises(InputError, match="float32"):
        search.top(vectors[0], 5)
    with pytest.raises(InputError, match="k is 0"):
        search.top(vectors[:2], 0)
    nan = vectors[:2].copy()
    nan[1, 3] = np.nan
    with pytest.raises(InputError, match="finite"):
        search.top(nan, 5)


@pytest.mark.parametrize("count", [1, 9])
def test_nan_in_the_vectors_is_noticed(vectors, count):
    broken = vectors.copy()
    broken[500, 0] = np.nan
    with pytest.raises(InputError, match="finite"):
        ExactSearch(broken).top(vectors[:count], 5)
