"""Bootstrap intervals: what they cover, and what they draw."""

import itertools

import numpy as np
import pytest

from fullrank.core import InputError
from fullrank.evaluate import bootstrap, bootstrap_interval
from fullrank.evaluate.bootstrap import column_intervals, expanded_share, student_quantile


@pytest.mark.parametrize("freedom", [1, 2, 3, 9, 30, 150, 5000])
@pytest.mark.parametrize("share", [0.6, 0.8, 0.95, 0.975, 0.995])
def test_student_quantile_agrees_with_scipy(share, freedom):
    stats = pytest.importorskip("scipy.stats")
    assert student_quantile(share, freedom) == pytest.approx(stats.t.ppf(share, freedom), rel=1e-8)


def test_all_resamples_of_three_values():
    # 27 equally likely resamples: the bootstrap distribution is known exactly.
    values = np.array([0.0, 1.0, 4.0])
    exact = np.sort([np.mean(draw) for draw in itertools.product(values, repeat=3)])
    groups = bootstrap.grouped(values[:, None], None)
    means = bootstrap.resampled_means(groups, 200_000, 0)[:, 0]
    for value in np.unique(exact):
        assert np.mean(np.isclose(means, value)) == pytest.approx(
            np.mean(np.isclose(exact, value)), abs=0.005
        )


def test_the_mean_is_weighted_by_queries_not_by_clusters():
    values, clusters = [0.0, 0.0, 0.0, 1.0], ["a", "a", "a", "b"]
    interval = bootstrap_interval(values, clusters, samples=1000)
    assert interval.mean == 0.25
    groups = bootstrap.grouped(np.array(values)[:, None], clusters)
    # Two clusters drawn: aa, ab, ba, bb.
    means = bootstrap.resampled_means(groups, 1000, 0)[:, 0]
    assert set(means.tolist()) == {0.0, 0.25, 1.0}


def coverage(intervals):
    return np.mean([i.lower <= 0 <= i.upper for i in intervals])


def test_coverage_of_independent_queries():
    rng = np.random.default_rng(1)
    # Skewed, as differences of metrics are: mostly ties and a few large ones.
    columns = rng.normal(size=(200, 400)) * (rng.random((200, 400)) < 0.3)
    assert 0.92 <= coverage(column_intervals(columns, samples=800)) <= 0.98


def test_coverage_of_clustered_queries_needs_the_clusters():
    rng = np.random.default_rng(2)
    clusters = np.repeat(np.arange(15), rng.integers(2, 20, size=15))
    columns = rng.normal(size=(15, 300))[clusters] + rng.normal(size=(len(clusters), 300))
    with_clusters = coverage(column_intervals(columns, clusters.tolist(), samples=800))
    assert 0.90 <= with_clusters <= 0.99
    assert coverage(column_intervals(columns, samples=800)) < 0.8


def test_the_interval_is_wider_for_few_groups():
    assert expanded_share(0.025, 5) < expanded_share(0.025, 20) < expanded_share(0.025, 500) < 0.025
    rng = np.random.default_rng(3)
    columns = rng.normal(size=(6, 500))
    assert coverage(column_intervals(columns, samples=800)) > 0.9


def test_seeds_chunks_and_columns(monkeypatch):
    values = np.random.default_rng(4).normal(size=(50, 3))
    first = column_intervals(values, samples=500, seed=7)
    assert first == column_intervals(values, samples=500, seed=7)
    assert first != column_intervals(values, samples=500, seed=8)
    alone = [bootstrap_interval(values[:, i], samples=500, seed=7) for i in range(3)]
    np.testing.assert_allclose(alone, first)
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 170)
    np.testing.assert_allclose(column_intervals(values, samples=500, seed=7), first)


def test_more_columns_than_a_block():
    values = np.random.default_rng(5).normal(size=(20, 70))
    found = column_intervals(values, samples=300)
    assert len(found) == 70
    np.testing.assert_allclose(found[69], bootstrap_interval(values[:, 69], samples=300))


def test_confidence_widens_and_text_shows_signs():
    values = np.random.default_rng(6).normal(size=100)
    narrow, wide = (bootstrap_interval(values, confidence=c) for c in (0.8, 0.99))
    assert wide.lower < narrow.lower < narrow.mean < narrow.upper < wide.upper
    assert str(bootstrap.Interval(0.5, -0.25, 1.0)) == "+0.5000 [-0.2500, +1.0000]"


@pytest.mark.parametrize(
    ("values", "options", "says"),
    [
        ([], {}, "one value a query"),
        ([[1.0, 2.0]], {}, "one value a query"),
        (1.0, {}, "one value a query"),
        ([1.0], {}, "at least 2"),
        ([1.0, 2.0], {"clusters": ["a", "a"]}, "at least 2"),
        ([1.0, 2.0], {"clusters": ["a"]}, "1 clusters for 2 queries"),
        ([1.0, 2.0], {"clusters": []}, "0 clusters for 2 queries"),
        ([1.0, float("nan")], {}, "nan at position 1"),
        ([float("inf"), 1.0], {}, "inf at position 0"),
        ([1.0, 2.0], {"samples": 0}, "0 samples"),
        ([1.0, 2.0], {"confidence": 1.0}, "confidence"),
        ([1.0, 2.0], {"confidence": 95}, "confidence"),
    ],
)
def test_bad_input(values, options, says):
    with pytest.raises(InputError, match=says):
        bootstrap_interval(values, **options)
