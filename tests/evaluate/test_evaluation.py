"""`evaluate` against ir-measures itself, and what it refuses."""

import json
import math
import re
from collections import Counter, defaultdict

import ir_measures
import numpy as np
import pytest

from fullrank.core import InputError, Run
from fullrank.evaluate import Evaluator, evaluate

METRICS = ["nDCG@10", "AP", "RR", "R@100", "P@10", "RR@10", "Bpref", "Rprec", "Judged@10"]


def by_ir_measures(run, qrels, metrics, tmp_path):
    """Per-query values through files, as someone else would compute them."""
    path = run.to_trec(tmp_path / "run.trec")
    parsed = {ir_measures.parse_measure(name): name for name in metrics}
    grades = [ir_measures.Qrel(q, d, g) for q, docs in qrels.items() for d, g in docs.items()]
    found = defaultdict(dict)
    for value in ir_measures.iter_calc(parsed, grades, ir_measures.read_trec_run(str(path))):
        found[parsed[value.measure]][value.query_id] = value.value
    return found


def test_random_runs_with_ties_agree_with_ir_measures(tmp_path):
    rng = np.random.default_rng(0)
    documents = [f"d{i}" for i in range(60)]
    qrels = {
        f"q{i}": {d: int(rng.integers(-1, 4)) for d in rng.choice(documents, 12, replace=False)}
        for i in range(40)
    }
    run = Run.from_dict(
        {
            q: {d: float(rng.integers(0, 6)) for d in rng.choice(documents, 30, replace=False)}
            for q in qrels
        }
    )
    measured = evaluate(run, qrels, METRICS).per_query
    expected = by_ir_measures(run, qrels, METRICS, tmp_path)
    for name in METRICS:
        assert measured[name] == pytest.approx(expected[name], abs=1e-12), name


@pytest.mark.data
def test_vaswani_agrees_with_ir_measures(data_folder, tmp_path):
    folder = data_folder / "vaswani"
    documents = re.findall(
        r"<DOCNO>(\d+)</DOCNO>(.*?)</DOC>", (folder / "doc-text.trec").read_text(), re.DOTALL
    )
    queries = re.findall(
        r"<num>(\d+)</num><title>(.*?)</title>", (folder / "query-text.trec").read_text(), re.DOTALL
    )
    qrels = defaultdict(dict)
    for line in (folder / "qrels").read_text().splitlines():
        query, _, document, grade = line.split()
        qrels[query][document] = int(grade)
    postings = defaultdict(dict)
    for document, text in documents:
        for word, times in Counter(text.lower().split()).items():
            postings[word][document] = times / (times + 1)
    scores = {}
    for query, text in queries:
        found = Counter()
        for word in text.lower().split():
            idf = math.log(len(documents) / (1 + len(postings[word])))
            for document, weight in postings[word].items():
                found[document] += idf * weight
        scores[query] = dict(found.most_common(1000))
    run = Run.from_dict(scores)
    measured = evaluate(run, qrels, METRICS)
    expected = by_ir_measures(run, qrels, METRICS, tmp_path)
    for name in METRICS:
        assert measured.per_query[name] == pytest.approx(expected[name], abs=1e-12), name
    assert len(measured.queries) == 93
    assert 0.3 < measured.mean["nDCG@10"] < 0.5


def test_the_order_shown_is_the_order_measured():
    # A reranker's order stands, though its scores say the opposite; ties in float32 do too.
    qrels = {"q": {"b": 1}}
    shown = Run({"q": (["b", "a"], [1.0, 2.0])}, ordered=True)
    assert evaluate(shown, qrels, ["RR"]).mean["RR"] == 1.0
    close = Run({"q": (["b", "z"], [1.0 + 1e-12, 1.0])})
    assert evaluate(close, qrels, ["RR", "RR@10"]).mean == {"RR": 1.0, "RR@10": 1.0}


def test_averages_run_over_the_judged_queries():
    qrels = {
        "answered": {"a": 1},
        "absent": {"a": 1},
        "empty": {"a": 1},
        "nothing relevant": {"a": 0, "b": -1},
        "no judgement": {},
    }
    run = Run(
        {
            "answered": (["a"], [1.0]),
            "empty": ([], []),
            "nothing relevant": (["a"], [1.0]),
            "no judgement": (["a"], [1.0]),
            "not judged": (["a"], [1.0]),
        }
    )
    found = evaluate(run, qrels, ["nDCG@10", "AP", "P@1", "Judged@10"])
    for metric in ("nDCG@10", "AP", "P@1"):
        assert found.per_query[metric] == {q: float(q == "answered") for q in qrels}
        assert found.mean[metric] == pytest.approx(0.2)
    # The order of the judgements is kept, whatever the run's or the metric's.
    assert [list(v) for v in found.per_query.values()] == [list(qrels)] * 4
    assert found.values("AP").tolist() == [1, 0, 0, 0, 0]


def test_names_are_kept_as_asked_for():
    found = evaluate({"q": {"x": 2.0, "a": 1.0}}, {"q": {"a": 1}}, ["MRR", "RR", "MRR", "MAP"])
    assert found.mean == {"MRR": 0.5, "RR": 0.5, "MAP": 0.5}
    assert evaluate({"q": {"a": 1.0}}, {"q": {"a": 1}}, "RR").mean == {"RR": 1.0}


def test_grades_may_be_numpy_integers_or_whole_floats():
    qrels = {"q": {"a": np.int64(2), "b": 1.0, "c": True}}
    assert evaluate({"q": {"a": 3.0, "b": 2.0, "c": 1.0}}, qrels, ["AP"]).mean["AP"] == 1.0


@pytest.mark.parametrize("grade", [0.5, "x", None, float("nan"), float("inf"), 2**31, -(2**40)])
def test_grades_that_are_no_integers_are_refused(grade):
    with pytest.raises(InputError, match="document 'a' has the grade"):
        evaluate({"q": {"a": 1.0}}, {"q": {"a": grade}}, ["AP"])


def test_queries_whose_grades_are_all_negative_have_nothing_relevant():
    metrics = ["nDCG", "nDCG@10", "AP", "AP(rel=2)", "RR", "R@5", "P@5", "Rprec", "Success@3"]
    metrics += ["SetP", "SetF", "Bpref", "infAP", "IPrec@0.5", "Compat", "ERR@5", "Judged@2"]
    evaluator = Evaluator({"q1": {"a": 0, "b": 1}, "q2": {"c": -2, "d": -7}}, metrics)
    found = evaluator({"q1": {"a": 1.0}, "q2": {"c": 1.0, "x": 2.0}}).per_query
    assert {name: values["q2"] for name, values in found.items()} == {
        **dict.fromkeys(metrics, 0.0),
        "Judged@2": 0.5,
    }


def test_bad_input_says_what_is_wrong():
    with pytest.raises(InputError, match="judgements are empty"):
        evaluate({"q": {"a": 1.0}}, {})
    with pytest.raises(InputError, match="no metric"):
        evaluate({"q": {"a": 1.0}}, {"q": {"a": 1}}, [])
    with pytest.raises(InputError, match=r"none of the 1 judged queries.*'1'.*'q1'"):
        evaluate({"1": {"a": 1.0}}, {"q1": {"a": 1}})
    with pytest.raises(InputError, match="none of the 1 judged queries"):
        evaluate({}, {"q1": {"a": 1}})
    with pytest.raises(InputError, match="not a finite number"):
        evaluate({"q": {"a": float("nan")}}, {"q": {"a": 1}})
    with pytest.raises(InputError, match="cannot compute"):
        evaluate({"q": {"a": 1.0}}, {"q": {"a": 1}}, ["INST(max_rel=1)"])
    with pytest.raises(InputError, match=r"cannot compute.*positive"):
        evaluate({"q": {"a": 1.0}}, {"q": {"a": 1}}, ["AP(rel=0)"])
    with pytest.raises(InputError, match="was not measured"):
        evaluate({"q": {"a": 1.0}}, {"q": {"a": 1}}, ["AP"]).values("RR")


def test_a_run_without_any_result_counts_nought():
    assert evaluate(Run({"q": ([], [])}), {"q": {"a": 1}}, ["AP", "RR@10"]).mean == {
        "AP": 0.0,
        "RR@10": 0.0,
    }


def test_one_evaluator_measures_many_runs():
    evaluator = Evaluator({"q": {"a": 1}}, ["RR", "Judged@10"])
    first = evaluator({"q": {"a": 1.0}})
    second = evaluator({"q": {"b": 2.0, "a": 1.0}})
    assert (first.mean["RR"], second.mean["RR"]) == (1.0, 0.5)
    assert evaluator({"q": {"a": 1.0}}) == first


def test_table_and_json():
    found = evaluate(Run.from_dict({"q": {"a": 1.0}}, name="one"), {"q": {"a": 1}}, ["RR", "AP"])
    assert found.table().markdown().splitlines()[-1] == "| one | 1.0000 | 1.0000 |"
    assert json.loads(found.to_json()) == {
        "system": "one",
        "queries": 1,
        "mean": {"RR": 1.0, "AP": 1.0},
        "per_query": {"RR": {"q": 1.0}, "AP": {"q": 1.0}},
    }


def test_gdeval_measures_queries_of_any_name():
    run = {"web-7": {"a": 2.0, "b": 1.0}, "Q": {"a": 1.0}}
    qrels = {"web-7": {"a": -1, "b": 2}, "Q": {"a": 1}, "7": {"a": 1}}
    found = evaluate(run, qrels, ["ERR@10"]).per_query["ERR@10"]
    assert found == {"web-7": 3 / 16 / 2, "Q": 1 / 16, "7": 0.0}
    with pytest.raises(InputError, match="grades up to 4"):
        evaluate(run, {"Q": {"a": 5}}, ["ERR@10"])


@pytest.mark.parametrize("qrels", [{1: {"a": 1}}, {"q": {1: 1}}])
def test_ids_that_are_no_strings_are_refused(qrels):
    with pytest.raises(InputError, match="ids are strings"):
        evaluate({"q": {"a": 1.0}}, qrels, ["AP"])
