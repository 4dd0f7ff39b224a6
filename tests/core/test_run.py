"""`Run`: order, ties, export, round trips. Properties, for any run."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fullrank.core import InputError, Run, StageTrace
from fullrank.core.run import strictly_decreasing, tie_ranks

# Short alphabets make repeated scores and ids that sort differently by length and case likely.
ids = st.text(alphabet="abAB019é雪", min_size=1, max_size=3)
few_scores = st.sampled_from([-1.0, 0.0, -0.0, 0.5, 1.0, 1.0 + 1e-9, 1e-40, 1e300, -1e300])
scores = few_scores | st.floats(allow_nan=False, allow_infinity=False)
dicts = st.dictionaries(ids, st.dictionaries(ids, scores, max_size=8), max_size=4)


@given(dicts)
def test_order_is_by_score_then_by_id_descending(data):
    run = Run.from_dict(data)
    assert list(run) == list(data)
    for query, found in data.items():
        expected = sorted(found.items(), key=lambda pair: (pair[1], pair[0]), reverse=True)
        # -0.0 equals 0.0, so compare as trec_eval does: by value.
        assert list(run[query]) == expected


@given(dicts)
def test_dicts_come_back(data):
    run = Run.from_dict(data)
    assert run.to_dict() == data
    assert Run.from_dict(run.to_dict()) == run


@given(dicts)
def test_exported_scores_fall_strictly_in_float32_and_keep_the_order(data):
    run = Run.from_dict(data)
    for query, exported in run.to_dict(strict=True).items():
        assert list(exported) == run[query].ids.tolist()
        single = np.array(list(exported.values()), dtype=np.float32)
        assert np.isfinite(single).all()
        assert (np.diff(single) < 0).all()
        # Nothing is lost by reading 32 bits, and nothing is zero to who flushes denormals.
        assert single.astype(np.float64).tolist() == list(exported.values())
        assert ((single == 0) | (np.abs(single) >= np.finfo(np.float32).tiny)).all()


@given(st.lists(scores, max_size=8), st.permutations(range(8)))
def test_any_order_given_is_the_order_exported(values, order):
    items = [f"d{i}" for i in order[: len(values)]]
    run = Run({"q": (items, values)}, ordered=True)
    assert run["q"].ids.tolist() == items
    assert list(run.to_dict(strict=True)["q"]) == items
    single = np.array(list(run.to_dict(strict=True)["q"].values()), dtype=np.float32)
    assert (np.diff(single) < 0).all()


@given(st.lists(st.integers(-1000, 1000), unique=True, max_size=8))
def test_scores_that_fall_already_are_left_alone(values):
    falling = np.array(sorted(values, reverse=True), dtype=np.float64)
    assert strictly_decreasing(falling).tolist() == falling.tolist()


@settings(max_examples=50)
@given(dicts)
def test_trec_eval_sees_the_order_that_is_shown(data):
    pytrec_eval = pytest.importorskip("pytrec_eval")
    run = Run.from_dict({q: found for q, found in data.items() if found})
    for query, ranking in run.items():
        exported = {query: run.to_dict(strict=True)[query]}
        for rank, item in enumerate(ranking.ids, 1):
            judge = pytrec_eval.RelevanceEvaluator({query: {item: 1}}, {"recip_rank"})
            assert judge.evaluate(exported)[query]["recip_rank"] == pytest.approx(1 / rank)


def test_the_order_survives_a_process_that_flushes_denormals():
    torch = pytest.importorskip("torch")
    pytrec_eval = pytest.importorskip("pytrec_eval")
    items = [f"d{i}" for i in range(12)]
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush denormals")
    try:
        exported = Run({"q": (items, [0.0] * 12)}, ordered=True).to_dict(strict=True)
        for rank, item in enumerate(items, 1):
            judge = pytrec_eval.RelevanceEvaluator({"q": {item: 1}}, {"recip_rank"})
            assert judge.evaluate(exported)["q"]["recip_rank"] == pytest.approx(1 / rank)
    finally:
        torch.set_flush_denormal(False)


@given(data=dicts, name=st.text(alphabet="ab \t", max_size=5))
def test_trec_files_come_back(data, name, tmp_path_factory):
    run = Run.from_dict(data, name=name)
    path = run.to_trec(tmp_path_factory.mktemp("trec") / "a run.trec")
    back = Run.from_trec(path)
    # A file has no line for a query without results.
    assert {q: back[q].ids.tolist() for q in back} == {
        q: r.ids.tolist() for q, r in run.items() if len(r)
    }
    assert back.to_dict() == {q: s for q, s in run.to_dict(strict=True).items() if s}
    if len(back):
        assert back.name == ("_".join(name.split()) or "run")
        ranks = [int(line.split()[3]) for line in path.read_text().splitlines()]
        assert ranks == [i for r in run.values() for i in range(1, len(r) + 1)]


@settings(max_examples=25)
@given(dicts)
def test_frames_come_back(data):
    pytest.importorskip("pandas")
    run = Run.from_dict(data)
    frame = run.to_frame()
    assert list(frame.columns) == ["qid", "docno", "score", "rank"]
    back = Run.from_frame(frame)
    assert back.to_dict() == {q: s for q, s in run.to_dict(strict=True).items() if s}
    assert all(back[q].ids.tolist() == run[q].ids.tolist() for q in back)
    shuffled = frame.sample(frac=1.0, random_state=0)
    renamed = shuffled.rename(columns={"qid": "query_id", "docno": "doc_id"})
    back = Run.from_frame(renamed.drop(columns="rank"))
    assert dict(back).keys() == {q for q in run if len(run[q])}
    assert all(back[q].ids.tolist() == run[q].ids.tolist() for q in back)


@given(st.data())
def test_a_matrix_gives_the_same_run_as_its_dict(data):
    items = data.draw(st.lists(ids, min_size=1, max_size=6, unique=True))
    queries = data.draw(st.lists(ids, max_size=3, unique=True))
    k = data.draw(st.integers(0, len(items)))
    rows, values, expected = [], [], {}
    for query in queries:
        chosen = data.draw(st.permutations(range(len(items))))[:k]
        kept = data.draw(st.integers(0, k))
        row = [*chosen[:kept], *[-1] * (k - kept)]
        value = data.draw(st.lists(scores, min_size=k, max_size=k))
        rows.append(row)
        values.append(value)
        expected[query] = {items[r]: v for r, v in zip(row, value, strict=True) if r >= 0}
    columns = np.array(items, dtype=object)
    run = Run.from_matrix(
        queries,
        columns,
        np.array(rows, dtype=np.int64).reshape(len(queries), k),
        np.array(values, dtype=np.float64).reshape(len(queries), k),
        tie_rank=tie_ranks(items),
    )
    assert run == Run.from_dict(expected)
    assert list(run) == queries


@given(dicts, st.integers(1, 10))
def test_top_keeps_the_head(data, k):
    run = Run.from_dict(data)
    for query, ranking in run.top(k).items():
        assert list(ranking) == list(run[query])[:k]
    assert run.top(k).top(k) == run.top(k)


@given(dicts, st.lists(ids, max_size=4))
def test_select_keeps_the_order_asked_for(data, queries):
    selected = Run.from_dict(data).select(queries)
    assert list(selected) == [q for q in dict.fromkeys(queries) if q in data]


@given(dicts, st.dictionaries(ids, st.lists(ids, max_size=3), max_size=3))
def test_drop_removes_and_nothing_else(data, unwanted):
    run = Run.from_dict(data)
    dropped = run.drop(unwanted)
    for query, ranking in run.items():
        gone = set(unwanted.get(query, ()))
        assert list(dropped[query]) == [pair for pair in ranking if pair[0] not in gone]


@given(dicts)
def test_what_is_derived_keeps_name_and_trace(data):
    run = Run(
        {q: (list(s), list(s.values())) for q, s in data.items()},
        name="mine",
        trace=[StageTrace("bm25", 1.5)],
    )
    for derived in (run.top(1), run.select(run), run.drop({})):
        assert (derived.name, derived.trace) == (run.name, run.trace)
    assert run.named("other").name == "other"
    assert run.named("other") == run
    timed = run.traced("rerank", 2.0, run.trace)
    assert timed.trace == (("bm25", 1.5), ("rerank", 2.0))
    assert math.isclose(timed.milliseconds, 3.5)


def test_tie_ranks_are_positions_in_id_order():
    assert tie_ranks(["b", "a", "é", "B"]).tolist() == [2, 1, 3, 0]


def test_the_callers_arrays_stay_theirs():
    values = np.array([2.0, 1.0])
    run = Run({"q": (["a", "b"], values)}, ordered=True)
    values[0] = -1.0
    assert run.to_dict() == {"q": {"a": 2.0, "b": 1.0}}


def test_rankings_cannot_be_changed_in_place():
    run = Run.from_dict({"q": {"a": 1.0, "b": 2.0}})
    for one in (run, run.top(1), run.drop({"q": ["a"]})):
        with pytest.raises(ValueError, match="read-only"):
            one["q"].scores[0] = 9.0
        with pytest.raises(ValueError, match="read-only"):
            one["q"].ids[0] = "z"


def test_equality_looks_at_order_and_scores():
    one = Run.from_dict({"q": {"a": 2.0, "b": 1.0}})
    assert one != Run.from_dict({"q": {"a": 1.0, "b": 2.0}})
    assert one != Run.from_dict({"q": {"a": 2.0}})
    assert one != Run.from_dict({"p": {"a": 2.0, "b": 1.0}})
    assert one != {"q": {"a": 2.0, "b": 1.0}}
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)
    assert repr(one) == "Run('run', 1 queries)"


@pytest.mark.parametrize(
    ("rankings", "says"),
    [
        ({"q": (["a"], [float("nan")])}, "item 'a' is not a finite"),
        ({"q": (["a", "b"], [1.0, float("inf")])}, "item 'b' is not a finite"),
        ({"q": (["a"], [None])}, "scores are not numbers|not a finite"),
        ({"q": (["a"], ["high"])}, "scores are not numbers"),
        ({"q": (["a", "b"], [1.0])}, "2 items but 1 scores"),
        ({"q": (["a"], [[1.0, 2.0]])}, "1 items but 2 scores"),
        ({"q": (["a", "b", "a"], [1.0, 2.0, 3.0])}, "'a' is ranked twice"),
        ({"q": ([1, 2], [1.0, 2.0])}, "id 1 is a int; ids are strings"),
        ({7: (["a"], [1.0])}, "id 7 is a int; ids are strings"),
    ],
)
@pytest.mark.parametrize("ordered", [False, True])
def test_bad_rankings_name_the_query(rankings, says, ordered):
    with pytest.raises(InputError, match=says):
        Run(rankings, ordered=ordered)


def test_bad_matrices():
    items = np.array(["a", "b"], dtype=object)
    rows, ties = np.array([[0, 1], [1, -1]]), tie_ranks(["a", "b"])
    with pytest.raises(InputError, match="query 'q2': a score is not a finite number"):
        Run.from_matrix(
            ["q1", "q2"], items, rows, np.array([[1.0, 2.0], [np.nan, 0.0]]), tie_rank=ties
        )
    # Padding may hold anything.
    run = Run.from_matrix(
        ["q1", "q2"], items, rows, np.array([[1.0, 2.0], [3.0, -np.inf]]), tie_rank=ties
    )
    assert run.to_dict() == {"q1": {"b": 2.0, "a": 1.0}, "q2": {"b": 3.0}}


def test_bad_k():
    with pytest.raises(InputError, match="k is 0"):
        Run({}).top(0)


@pytest.mark.parametrize(
    "line",
    [b"q1 Q0 d1 1 0.5", b"q1 Q0 d1 1 high tag", b"q1 Q0 d1 1 0.5 two tags", b"q1 Q0 d\xff 1 1.0 t"],
)
def test_bad_trec_lines_are_located(tmp_path, line):
    path = tmp_path / "run.trec"
    path.write_bytes(b"q0 Q0 d1 1 0.5 tag\n\n" + line + b"\n")
    with pytest.raises(InputError, match="line 3: expected 'qid Q0 docid rank score tag'"):
        Run.from_trec(path)


def test_trec_files_are_sorted_by_score_whatever_their_ranks(tmp_path):
    path = tmp_path / "run.trec"
    path.write_text("q Q0 a 1 -2 t\r\nq Q0 b 2 -1e0 t\r\nq Q0 c 3 -1.0 t\r\n")
    assert Run.from_trec(path)["q"].ids.tolist() == ["c", "b", "a"]
    path.write_text("")
    assert len(Run.from_trec(path)) == 0
    path.write_text("q Q0 a 1 nan t\n")
    with pytest.raises(InputError, match="not a finite number"):
        Run.from_trec(path)


def test_ids_that_would_break_a_trec_file_are_refused(tmp_path):
    for data in ({"q 1": {"a": 1.0}}, {"q": {"a\tb": 1.0}}, {"q": {"": 1.0}}):
        with pytest.raises(InputError, match="white space"):
            Run.from_dict(data).to_trec(tmp_path / "run.trec")
    assert not (tmp_path / "run.trec").exists()


def test_a_frame_without_the_columns():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(InputError, match=r"lacks \['docno', 'score'\]"):
        Run.from_frame(pandas.DataFrame({"qid": ["q"], "text": ["x"]}))


def test_a_frame_sorted_by_score_shows_the_order_of_the_run():
    pytest.importorskip("pandas")
    run = Run({"q": (["b", "a"], [1.0, 2.0])}, ordered=True)
    frame = run.to_frame()
    assert frame.sort_values("score", ascending=False)["docno"].tolist() == ["b", "a"]
    assert Run.from_frame(frame)["q"].ids.tolist() == ["b", "a"]


def test_ids_of_a_frame_are_text_and_all_there():
    pandas = pytest.importorskip("pandas")
    columns = {"qid": [1, "1", 2], "docno": ["a", "b", 3], "score": [1.0, 2.0, 1.0]}
    run = Run.from_frame(pandas.DataFrame(columns))
    assert run.to_dict() == {"1": {"b": 2.0, "a": 1.0}, "2": {"3": 1.0}}
    with pytest.raises(InputError, match="'a' is ranked twice"):
        Run.from_frame(pandas.DataFrame({**columns, "docno": ["a", "a", "b"]}))
    for column in ("qid", "docno"):
        for absent in (None, float("nan")):
            frame = pandas.DataFrame({**columns, column: ["a", absent, "b"]})
            with pytest.raises(InputError, match=f"'{column}' of the frame lacks 1 of its ids"):
                Run.from_frame(frame)


def test_half_a_surrogate_pair_is_not_written(tmp_path):
    with pytest.raises(InputError, match=r"surrogate pair.*'q2 Q0 d\\ud800 1 1.0 run'"):
        Run.from_dict({"q1": {"a": 1.0}, "q2": {"d\ud800": 1.0}}).to_trec(tmp_path / "run.trec")
    assert not (tmp_path / "run.trec").exists()


def test_a_byte_order_mark_is_no_part_of_a_query(tmp_path):
    path = tmp_path / "marked.run"
    path.write_bytes(b"\xef\xbb\xbfq1 Q0 d1 1 2.0 tag\n\xef\xbb\xbfq1 Q0 d2 2 1.0 tag\n")
    # It begins a file; anywhere else it is a character as any other.
    assert list(Run.from_trec(path)) == ["q1", "\ufeffq1"]


@pytest.mark.parametrize("second", ["q Q0 b 2 nan t", "q Q0 a 2 0.5 t"])
def test_errors_in_a_trec_file_name_it(tmp_path, second):
    path = tmp_path / "odd.run"
    path.write_text(f"q Q0 a 1 1.0 t\n{second}\n")
    with pytest.raises(InputError, match=r"odd\.run: query 'q'"):
        Run.from_trec(path)


def test_lowered_scores_are_never_denormal():
    tiny = np.finfo(np.float32).tiny
    scores = np.sort(np.random.default_rng(0).normal(scale=3 * tiny, size=500))[::-1]
    for falling in (scores, np.full(4, 1.7 * tiny)):
        lowered = strictly_decreasing(falling).astype(np.float32)
        assert (np.diff(lowered) < 0).all()
        assert not ((lowered != 0) & (np.abs(lowered) < tiny)).any()
