"""Floors: non-inferiority, and the strictest floor that can be told."""

import numpy as np
import pytest

from fullrank.core import InputError
from fullrank.evaluate import floor_test, smallest_floor


@pytest.fixture(scope="module")
def pair():
    rng = np.random.default_rng(0)
    base = rng.beta(2, 3, size=800)
    return base * 0.99 + rng.normal(scale=0.05, size=800), base


def test_the_lower_end_decides_not_the_ratio(pair):
    values, base = pair
    found = floor_test(values, base, 0.97)
    assert found.ratio == pytest.approx(values.mean() / base.mean())
    assert found.lower < found.ratio
    for floor in (found.lower - 1e-6, found.lower):
        assert floor_test(values, base, floor).holds
    between = (found.lower + found.ratio) / 2
    assert not floor_test(values, base, between).holds


def test_the_lower_end_agrees_with_the_delta_method(pair):
    values, base = pair
    ratio = values.mean() / base.mean()
    spread = (values - ratio * base).std(ddof=1) / np.sqrt(len(base)) / base.mean()
    found = floor_test(values, base, 0.97)
    assert found.lower == pytest.approx(ratio - 1.645 * spread, abs=0.1 * spread)


def test_clusters_widen_the_interval_when_they_matter(pair):
    values, base = pair
    clusters = np.arange(800) // 20
    shared = values + np.random.default_rng(1).normal(scale=0.05, size=40)[clusters]
    alone = floor_test(shared, base, 0.9)
    drawn = floor_test(shared, base, 0.9, clusters=clusters.tolist())
    assert drawn.ratio == alone.ratio
    assert drawn.lower < alone.lower


def test_equal_systems_hold_every_floor_up_to_one(pair):
    _, base = pair
    assert floor_test(base, base, 1.0) == (1.0, 1.0, 1.0, True)
    assert floor_test(0.97 * base, base, 0.97).holds
    assert not floor_test(base, base, 1.001).holds
    assert smallest_floor(base, base) == 1.0


def test_an_absolute_floor_is_a_share_of_ones(pair):
    _, base = pair
    found = floor_test(base, np.ones_like(base), 0.38)
    assert found.ratio == pytest.approx(base.mean())
    assert found.holds


def test_the_false_pass_rate_is_what_the_confidence_says():
    rng = np.random.default_rng(2)
    passed = 0
    for _ in range(300):
        base = rng.beta(2, 3, size=60)
        values = 0.95 * base + rng.normal(scale=0.08, size=60)
        passed += floor_test(values, base, 0.95, samples=500).holds
    assert passed / 300 == pytest.approx(0.05, abs=0.035)


def test_an_equally_good_system_passes_the_smallest_floor_as_often_as_it_says():
    rng = np.random.default_rng(3)

    def draw():
        base = rng.beta(2, 3, size=150)
        return base + rng.normal(scale=0.1, size=150), base

    floors = [smallest_floor(*draw(), samples=500) for _ in range(30)]
    floor = float(np.mean(floors))
    passed = np.mean([floor_test(*draw(), floor, samples=500).holds for _ in range(300)])
    assert passed == pytest.approx(0.8, abs=0.08)


def test_the_smallest_floor_does_not_depend_on_how_good_the_system_is(pair):
    values, base = pair
    assert smallest_floor(0.5 * values, base) == pytest.approx(smallest_floor(values, base))
    half = smallest_floor(values, base, power=0.5)
    found = floor_test(values, base, 0.9)
    assert half == pytest.approx(found.lower / found.ratio)
    assert smallest_floor(values, base, power=0.9) < smallest_floor(values, base) < half < 1
    assert smallest_floor(values[:200], base[:200]) < smallest_floor(values, base)


def test_mappings_are_matched_by_query(pair):
    values, base = pair
    names = [f"q{i}" for i in range(len(base))]
    clusters = {q: i % 50 for i, q in enumerate(names)}
    by_name = floor_test(
        dict(zip(names, values, strict=True)),
        dict(reversed(list(zip(names, base, strict=True)))),
        0.9,
        clusters=clusters,
    )
    assert by_name == floor_test(values, base, 0.9, clusters=list(clusters.values()))
    assert floor_test({"a": 1.0, "b": 2.0}, {"a": 1.0, "b": 2.0}, 1.0, clusters={}).holds


def test_a_draw_on_which_the_base_is_worth_nothing_does_not_pass():
    # Most resamples miss the one query on which the base is right.
    base, values = [0.0] * 19 + [1.0], [0.05] * 19 + [1.0]
    found = floor_test(values, base, 0.9)
    assert found.lower == -np.inf
    assert not found.holds
    assert smallest_floor(values, base) == 0.0


def test_seeds(pair):
    values, base = pair
    assert floor_test(values, base, 0.9, seed=3) == floor_test(values, base, 0.9, seed=3)
    assert floor_test(values, base, 0.9, seed=3) != floor_test(values, base, 0.9, seed=4)


def test_the_outcome_reads_as_a_sentence():
    from fullrank.evaluate import FloorTest

    assert str(FloorTest(0.985, 0.962, 0.97, False)) == (
        "keeps 98.50% (lower end 96.20%): the floor of 97.00% does not hold"
    )


@pytest.mark.parametrize(
    ("values", "base", "options", "says"),
    [
        ([], [], {}, "one value a query"),
        ([1.0], [1.0], {}, "at least 2"),
        ([1.0, 2.0], [1.0], {}, "of one length"),
        ([1.0, 2.0], [1.0, float("nan")], {}, "base's values hold nan"),
        ([1.0, 2.0], [0.0, 0.0], {}, "positive"),
        ([1.0, 2.0], [-1.0, 0.5], {}, "positive"),
        ([1.0, 2.0], [1.0, 2.0], {"floor": 0}, "floor is 0"),
        ([1.0, 2.0], [1.0, 2.0], {"floor": float("nan")}, "floor is nan"),
        ([1.0, 2.0], [1.0, 2.0], {"clusters": ["a", "a"]}, "at least 2"),
        ([1.0, 2.0], [1.0, 2.0], {"clusters": ["a"]}, "1 clusters for 2"),
        ([1.0, 2.0], [1.0, 2.0], {"clusters": {"q": "a"}}, "by query id"),
        ([1.0, 2.0], [1.0, 2.0], {"confidence": 0.4}, "confidence"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0, "c": 1.0}, {}, "'b' is in one only"),
        ({"a": 1.0, "b": 1.0}, [1.0, 1.0], {}, "both be mappings"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}, {"clusters": {"a": 1}}, "have no cluster"),
    ],
)
def test_bad_input(values, base, options, says):
    with pytest.raises(InputError, match=says):
        floor_test(values, base, **{"floor": 0.9, **options})


def test_bad_input_of_the_smallest_floor():
    with pytest.raises(InputError, match="power"):
        smallest_floor([1.0, 2.0], [1.0, 2.0], power=1.0)
    with pytest.raises(InputError, match="ratio of means"):
        smallest_floor([0.0, 0.0], [1.0, 2.0])
