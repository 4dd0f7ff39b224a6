"""Stages and their operators: what is ranked, what is timed, what is refused."""

import time

import numpy as np
import pytest

from fullrank.core import Corpus, InputError, Run
from fullrank.retrieval import Generator, Reranker, Retriever, Stage, rrf, weighted
from fullrank.retrieval.stages import as_stage

QUERIES = {"q1": "one", "q2": "two"}


class Fixed(Stage):
    """Ranks what it is given, whatever the query."""

    def __init__(self, name, scores, seconds=0.0, corpus=None):
        self.name, self.scores, self.seconds, self.corpus = name, scores, seconds, corpus

    def transform(self, queries, run, corpus):
        time.sleep(self.seconds)
        return Run.from_dict(dict.fromkeys(queries, self.scores))


class Reverse(Stage):
    """Turns rankings around."""

    name = "reverse"

    def transform(self, queries, run, corpus):
        return Run({q: (r.ids[::-1], -r.scores[::-1]) for q, r in run.items()}, ordered=True)


@pytest.fixture
def a():
    return Fixed("a", {"x": 3.0, "y": 2.0, "z": 1.0})


@pytest.fixture
def b():
    return Fixed("b", {"z": 30.0, "w": 10.0})


def ids(run, query="q1"):
    return run[query].ids.tolist()


def test_then_hands_the_run_on(a):
    run = (a >> Reverse())(QUERIES)
    assert ids(run) == ["z", "y", "x"]
    assert list(run) == ["q1", "q2"]
    assert run.name == "a >> reverse"


def test_cutoff(a):
    assert ids((a % 2)(QUERIES)) == ["x", "y"]
    assert ids((a % 9)(QUERIES)) == ["x", "y", "z"]
    assert (a % 2).name == "a % 2"


def test_cutoff_binds_tighter_than_then(a):
    assert ids((a % 2 >> Reverse())(QUERIES)) == ["y", "x"]
    assert ids((a >> Reverse() % 2)(QUERIES)) == ["z", "y"]


def test_sum_and_product(a, b):
    run = (a + 0.1 * b)(QUERIES)
    assert run["q1"].ids.tolist() == ["z", "x", "y", "w"]
    np.testing.assert_allclose(run["q1"].scores, [4.0, 3.0, 2.0, 1.0])
    assert (2 * a)(QUERIES) == (a * 2)(QUERIES) == (a + a)(QUERIES)
    assert (a + 0.1 * b).name == "a + (0.1 * b)"


def test_sets(a, b):
    assert ids((a & b)(QUERIES)) == ["z"]
    assert ids((a | b)(QUERIES)) == ["x", "y", "z", "w"]
    assert ids((b | a)(QUERIES)) == ["z", "w", "x", "y"]


@pytest.mark.parametrize(
    "refused",
    [
        lambda s, a: s % 3,
        lambda s, a: s + a,
        lambda s, a: a + s,
        lambda s, a: 2 * s,
        lambda s, a: rrf(s, a),
        lambda s, a: weighted(a, s),
        lambda s, a: (a >> s) % 3,
    ],
)
@pytest.mark.parametrize("union", [True, False])
def test_scores_of_sets_are_undefined(a, b, refused, union):
    stage = a | b if union else a & b
    with pytest.raises(InputError, match="undefined"):
        refused(stage, a)


def test_a_reranked_set_has_scores_again(a, b):
    assert ids(((a | b) >> Reverse() % 2)(QUERIES)) == ["w", "z"]
    assert ids((((a | b) >> Reverse()) % 2)(QUERIES)) == ["w", "z"]
    assert ids(((a & b) | a)(QUERIES)) == ["z", "x", "y"]


def test_the_expression_of_the_design(a, b):
    pipeline = rrf(a, b) % 2 >> Reverse()
    run = pipeline(QUERIES)
    assert pipeline.name == "rrf(a, b) % 2 >> reverse"
    assert ids(run) == ["x", "z"]
    assert [s.stage for s in run.trace] == ["a", "b", "rrf", "% 2", "reverse"]


def test_a_stage_that_fuses_in_the_middle_sees_the_run(a):
    run = (a % 2 >> rrf(Reverse(), Reverse()))(QUERIES)
    assert ids(run) == ["y", "x"]
    assert [s.stage for s in run.trace] == ["a", "% 2", "reverse", "reverse", "rrf"]


def test_milliseconds_add_up():
    slow, slower = Fixed("slow", {"x": 1.0}, 0.02), Fixed("slower", {"y": 1.0}, 0.03)
    began = time.perf_counter()
    run = (rrf(slow, slower) % 5 >> Reverse())(QUERIES)
    elapsed = (time.perf_counter() - began) * 1e3
    spent = {s.stage: s.milliseconds for s in run.trace}
    assert 20 <= spent["slow"] <= elapsed
    assert 30 <= spent["slower"] <= elapsed
    assert 50 <= run.milliseconds <= elapsed + 1e-6


def test_a_composite_written_by_a_user_shows_its_own_time():
    inner = Fixed("inner", {"x": 1.0}, 0.02)

    class Outer(Stage):
        name = "outer"

        def transform(self, queries, run, corpus):
            time.sleep(0.01)
            return inner(queries, run, corpus)

    run = (Fixed("first", {"y": 1.0}) >> Outer())(QUERIES)
    assert [s.stage for s in run.trace] == ["first", "inner", "outer"]
    assert run.trace[2].milliseconds < run.trace[1].milliseconds


def test_functions_are_stages(a):
    def keep_first(queries, run, corpus):
        return run.top(1)

    assert ids((a >> keep_first)(QUERIES)) == ["x"]
    assert (a >> keep_first).name == "a >> keep_first"
    assert as_stage(a) is a


def test_a_function_may_come_first(a):
    def twice(queries, run, corpus):
        return Run.from_dict({q: {"x": 2.0} for q in queries})

    assert ids((twice >> Reverse())(QUERIES)) == ["x"]


def test_the_corpus_reaches_later_stages():
    corpus = Corpus(["x"], ["a text"])
    seen = []

    def look(queries, run, corpus):
        seen.append(corpus)
        return run

    (Fixed("a", {"x": 1.0}, corpus=corpus) % 1 >> look)(QUERIES)
    (Fixed("a", {"x": 1.0}) >> look)(QUERIES, None, corpus)
    assert seen == [corpus, corpus]


def test_named(a, b):
    hybrid = rrf(a, b).named("hybrid")
    assert hybrid(QUERIES).name == "hybrid"
    assert (hybrid % 2).name == "hybrid % 2"
    assert repr(hybrid).endswith("hybrid>")


@pytest.mark.parametrize("k", [0, -1, 2.5, True, "3"])
def test_bad_cutoffs(a, k):
    with pytest.raises(InputError, match="at least 1"):
        a % k


@pytest.mark.parametrize("queries", ["one", ["one"], {"q": 3}, {3: "one"}, None])
def test_bad_queries(a, queries):
    with pytest.raises(InputError):
        (a % 2)(queries)


def test_bad_parts(a):
    with pytest.raises(InputError, match="no stage"):
        a >> 3
    with pytest.raises(InputError, match="two or more"):
        rrf(a)
    with pytest.raises(InputError, match="two or more"):
        weighted(a, a(QUERIES))
    with pytest.raises(TypeError):
        a + 3
    with pytest.raises(TypeError):
        a & 3
    with pytest.raises(InputError, match="finite"):
        float("inf") * a


def test_no_queries(a, b):
    assert len((rrf(a, b) % 2 >> Reverse())({})) == 0


def test_protocols():
    class Own:
        def search(self, queries, k):
            return Run({})

        def rerank(self, queries, run, corpus=None):
            return run

        def generate(self, queries, run, corpus=None):
            return {}

    assert all(isinstance(Own(), p) for p in (Retriever, Reranker, Generator))
    assert not isinstance(object(), Retriever)
