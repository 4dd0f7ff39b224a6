"""Fusion against its formulas written out, and what it owes to its inputs' order."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.core import InputError, Run
from fullrank.retrieval import rrf, weighted
from fullrank.retrieval.fusion import fuse_scores, intersect, unite

items = st.sampled_from([f"d{i}" for i in range(12)])
values = st.floats(-1e3, 1e3).map(lambda x: round(x, 3))
runs = st.dictionaries(st.sampled_from(["a", "b", "c"]), st.dictionaries(items, values), min_size=1)


def slow_rrf(given, k):
    out = {}
    for run in given:
        for query, ranking in run.items():
            scores = out.setdefault(query, {})
            for rank, item in enumerate(ranking.ids, 1):
                scores[item] = scores.get(item, 0.0) + 1 / (k + rank)
    return Run.from_dict(out)


def slow_weighted(given, weights, normalise):
    out = {}
    for run, weight in zip(given, weights, strict=True):
        for query, ranking in run.items():
            scores = out.setdefault(query, {})
            s = ranking.scores
            if len(s) and normalise == "minmax":
                s = (s - s.min()) / np.ptp(s) if np.ptp(s) > 0 else np.ones_like(s)
            if len(s) and normalise == "zscore":
                s = (s - s.min()) / s.std() if np.ptp(s) > 0 else np.zeros_like(s)
            for item, value in zip(ranking.ids, s, strict=True):
                scores[item] = scores.get(item, 0.0) + weight * value
    return Run.from_dict(out)


def same(found, expected):
    assert set(found) == set(expected)
    scored = found.to_dict()
    for query, ranking in expected.items():
        mine = scored[query]
        assert mine.keys() == set(ranking.ids)
        for item, value in ranking:
            assert mine[item] == pytest.approx(value, rel=1e-9, abs=1e-9)
        scores = found[query].scores
        assert (np.diff(scores) <= 0).all()
        for i, j in itertools.pairwise(range(len(scores))):
            if scores[i] == scores[j]:
                assert found[query].ids[i] > found[query].ids[j]


@settings(max_examples=60, deadline=None)
@given(st.lists(runs, min_size=2, max_size=4), st.sampled_from([0, 1, 60]))
def test_rrf_is_its_formula(given, k):
    given = [Run.from_dict(run) for run in given]
    same(rrf(*given, k=k), slow_rrf(given, k))


@settings(max_examples=60, deadline=None)
@given(st.lists(runs, min_size=2, max_size=3), st.sampled_from(["minmax", "zscore", None]))
def test_weighted_is_its_formula(given, normalise):
    given = [Run.from_dict(run) for run in given]
    weights = [0.2, 0.5, -0.3][: len(given)]
    same(
        weighted(*given, weights=weights, normalise=normalise),
        slow_weighted(given, weights, normalise),
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(runs, min_size=3, max_size=3))
def test_the_order_of_runs_does_not_matter(given):
    given = [Run.from_dict(run) for run in given]
    first = rrf(*given)
    for permuted in itertools.permutations(given):
        other = rrf(*permuted)
        assert {q: list(r) for q, r in other.items()} == {q: list(r) for q, r in first.items()}


def test_zscores_rank_as_with_gaps_filled_by_the_lowest():
    a = Run.from_dict({"q": {"x": 5.0, "y": 1.0, "z": 0.5, "v": 0.0}})
    b = Run.from_dict({"q": {"y": 9.0, "w": 8.0, "v": 5.0}})
    filled = []
    for run in (a, b):
        s = run["q"].scores
        z = dict(zip(run["q"].ids, (s - s.mean()) / s.std(), strict=True))
        filled.append({i: z.get(i, min(z.values())) for i in "vwxyz"})
    expected = sorted("vwxyz", key=lambda i: -filled[0][i] - filled[1][i])
    assert weighted(a, b, normalise="zscore")["q"].ids.tolist() == expected


def test_reciprocal_ranks_follow_the_order_not_the_scores():
    decided = Run({"q": (["low", "high"], [1.0, 2.0])}, ordered=True)
    assert rrf(decided, decided)["q"].ids.tolist() == ["low", "high"]


def test_equal_scores_count_as_found():
    one = Run.from_dict({"q": {"x": 7.0}})
    other = Run.from_dict({"q": {"y": 2.0, "z": 1.0}})
    assert weighted(one, other).to_dict() == {"q": {"y": 0.5, "x": 0.5, "z": 0.0}}


def test_queries_that_some_lack_and_empty_rankings():
    a = Run({"q1": (["x"], [1.0]), "q2": ([], [])})
    b = Run({"q3": (["y"], [1.0])})
    for fused in (rrf(a, b), weighted(a, b), weighted(a, b, normalise="zscore")):
        assert {q: r.ids.tolist() for q, r in fused.items()} == {"q1": ["x"], "q2": [], "q3": ["y"]}
    assert len(rrf(Run({}), Run({}))) == 0
    nothing = Run({"q": ([], [])})
    assert rrf(nothing, nothing)["q"].ids.tolist() == []


def test_sets_of_runs():
    a = Run.from_dict({"q": {"x": 2.0, "y": 1.0}, "p": {"x": 1.0}})
    b = Run.from_dict({"q": {"y": 5.0, "z": 4.0}, "r": {"z": 1.0}})
    both, either = intersect([a, b]), unite([a, b])
    assert {q: r.ids.tolist() for q, r in both.items()} == {"q": ["y"], "p": [], "r": []}
    assert {q: r.ids.tolist() for q, r in either.items()} == {
        "q": ["x", "y", "z"], "p": ["x"], "r": ["z"],
    }  # fmt: skip
    assert either["q"].scores.tolist() == [0.0, 0.0, 0.0]


def test_many_queries():
    draw = np.random.default_rng(0)
    names = np.array([f"doc{i}" for i in range(5000)], dtype=object)
    given = [
        Run({f"q{i}": (names[draw.permutation(5000)[:100]], draw.random(100)) for i in range(300)})
        for _ in range(2)
    ]
    same(rrf(*given), slow_rrf(given, 60))


@pytest.mark.parametrize("k", [-1, float("nan"), float("inf"), "60"])
def test_bad_k(k):
    run = Run({"q": (["x"], [1.0])})
    with pytest.raises(InputError, match="reciprocal"):
        rrf(run, run, k=k)


def test_bad_weights():
    run = Run({"q": (["x"], [1.0])})
    with pytest.raises(InputError, match="one each"):
        weighted(run, run, weights=[1.0])
    with pytest.raises(InputError, match="finite"):
        weighted(run, run, weights=[1.0, float("nan")])
    with pytest.raises(InputError, match="normalise"):
        weighted(run, run, normalise="softmax")
    with pytest.raises(InputError, match="weights"):
        fuse_scores([run], [])
