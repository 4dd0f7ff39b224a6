"""`compare`: several runs, tested together."""

import json

import numpy as np
import pytest

from fullrank.core import InputError, Run
from fullrank.evaluate import bootstrap_interval, compare, evaluate, holm, randomisation_test

DOCUMENTS = [f"d{i}" for i in range(30)]


@pytest.fixture(scope="module")
def qrels():
    rng = np.random.default_rng(0)
    return {f"q{i}": dict.fromkeys(rng.choice(DOCUMENTS, 3, replace=False), 1) for i in range(80)}


@pytest.fixture(scope="module")
def runs(qrels):
    rng = np.random.default_rng(1)

    def noisy(name, skill):
        return Run.from_dict(
            {q: {d: rng.random() + skill * (d in qrels[q]) for d in DOCUMENTS} for q in qrels},
            name=name,
        )

    return [noisy("weak", 0.0), noisy("strong", 0.5), noisy("again", 0.5)]


@pytest.fixture(scope="module")
def comparison(runs, qrels):
    return compare(runs, qrels, ["nDCG@10", "AP"])


def test_every_number_is_that_of_the_single_functions(comparison, runs, qrels):
    by_name = {run.name: evaluate(run, qrels, ["nDCG@10", "AP"]) for run in runs}
    order = ["weak", "strong", "again"]
    tests = {}
    for metric in ("nDCG@10", "AP"):
        for before, name in zip([None, *order], order, strict=False):
            row = comparison.row(name, metric)
            assert row.mean == by_name[name].mean[metric]
            for found, other in ((row.baseline, "weak"), (row.previous, before)):
                if other in (None, name):
                    assert found is None
                    continue
                a, b = by_name[name].values(metric), by_name[other].values(metric)
                interval = bootstrap_interval(a - b)
                assert found.against == other
                assert (found.mean, found.lower, found.upper) == pytest.approx(tuple(interval))
                assert found.p == randomisation_test(a, b)
                tests[metric, name, other] = found
    assert comparison.tests == len(tests) == 6
    corrected = holm(t.p for t in tests.values())
    assert [t.p_holm for t in tests.values()] == pytest.approx(corrected)


def test_better_is_told_from_alike(comparison):
    better, alike = comparison.row("strong").baseline, comparison.row("again").previous
    assert better.lower > 0
    assert better.p_holm < 0.01
    assert alike.lower < 0 < alike.upper
    assert alike.p_holm > 0.05


def test_a_baseline_in_the_middle_and_the_same_test_twice(runs, qrels):
    found = compare(runs, qrels, ["AP"], baseline="strong", permutations=500, samples=500)
    weak, strong, again = found.rows
    assert strong.baseline is None
    assert weak.previous is None
    # weak against strong and strong against weak are one test.
    assert weak.baseline.mean == pytest.approx(-strong.previous.mean)
    assert (weak.baseline.p, weak.baseline.p_holm) == (strong.previous.p, strong.previous.p_holm)
    assert again.baseline == again.previous
    assert found.tests == 2


def test_clusters_reach_interval_and_test(runs, qrels):
    clusters = {q: f"m{i % 8}" for i, q in enumerate(qrels)}
    found = compare(runs[:2], qrels, ["AP"], clusters=clusters)
    a, b = (evaluate(run, qrels, ["AP"]).values("AP") for run in runs[1::-1])
    labels = list(clusters.values())
    row = found.row("strong").baseline
    assert (row.mean, row.lower, row.upper) == pytest.approx(
        tuple(bootstrap_interval(a - b, labels))
    )
    # Eight clusters: every swap is tried.
    assert row.p == randomisation_test(a, b, clusters=labels) == 2 / 2**8
    assert found.clusters == 8
    assert "80 queries in 8 clusters" in found.table().title
    assert compare(runs[:2], qrels, ["AP"], clusters=labels).rows == found.rows
    assert compare(runs[:2], qrels, ["AP"], clusters={}).clusters is None


def test_a_mapping_renames(runs, qrels):
    found = compare({"a": runs[0], "b": runs[1]}, qrels, ["AP"], samples=100, permutations=100)
    assert [row.system for row in found.rows] == ["a", "b"]
    assert found.baseline == "a"
    assert found.evaluations["b"].name == "b"
    assert runs[0].name == "weak"


def test_one_run_is_measured_and_not_tested(runs, qrels):
    found = compare(runs[:1], qrels, ["AP"])
    assert found.tests == 0
    assert found.rows[0].baseline is found.rows[0].previous is None


def test_tables(comparison):
    single = comparison.table("nDCG@10")
    assert list(single.columns) == [
        "system",
        "nDCG@10",
        "vs weak",
        "p vs weak",
        "vs previous",
        "p vs previous",
    ]
    lines = single.markdown().splitlines()
    assert "Holm-corrected over 6 tests" in lines[0]
    assert lines[4].startswith("| weak | 0.")
    assert lines[4].endswith("|  |  |  |  |")
    assert "[+0." in lines[5]
    assert "<0.001" in lines[5] or " 0.00" in lines[5]
    everything = comparison.table()
    assert len(everything.rows) == 6
    assert [row[0] for row in everything.rows] == ["nDCG@10"] * 3 + ["AP"] * 3
    assert list(comparison.means().columns) == ["system", "nDCG@10", "AP"]
    assert len(comparison.means().rows) == 3


def test_json_and_frame(comparison):
    data = json.loads(comparison.to_json())
    assert data["queries"] == 80
    assert data["rows"][0]["baseline"] is None
    assert data["rows"][1]["baseline"]["against"] == "weak"
    frame = comparison.frame()
    assert len(frame) == 6
    assert frame["baseline_lower"].iloc[1] == comparison.row("strong").baseline.lower


def test_contrast_of_two_of_the_systems(comparison):
    found = comparison.contrast("strong", metric="AP", top=3)
    assert found.wins + found.ties + found.losses == 80
    assert found.wins > found.losses
    assert len(found.gains) == 3
    best = found.gains[0]
    per_query = {n: comparison.evaluations[n].per_query["AP"] for n in ("weak", "strong")}
    assert best.difference == max(v - per_query["weak"][q] for q, v in per_query["strong"].items())
    assert (
        comparison.contrast("strong", "again").wins == comparison.contrast("again", "strong").losses
    )


def test_seeds(runs, qrels):
    options = {"samples": 200, "permutations": 200}
    first, same, other = (compare(runs, qrels, ["AP"], seed=s, **options) for s in (1, 1, 2))
    assert first.rows == same.rows != other.rows


def test_bad_input(runs, qrels):
    with pytest.raises(InputError, match="no runs"):
        compare([], qrels)
    with pytest.raises(InputError, match="one run was given"):
        compare(runs[0], qrels)
    with pytest.raises(InputError, match="two runs are named 'weak'"):
        compare([runs[0], runs[1].named("weak")], qrels)
    with pytest.raises(InputError, match="not a Run"):
        compare({"a": {"q1": {"d": 1.0}}}, qrels)
    with pytest.raises(InputError, match=r"baseline 'bm25' is none of the runs: weak, strong"):
        compare(runs[:2], qrels, baseline="bm25")
    with pytest.raises(InputError, match="did you mean"):
        compare(runs, qrels, ["ndcg"])
    with pytest.raises(InputError, match=r"have no cluster, e\.g\. 'q3'"):
        compare(runs, qrels, ["AP"], clusters={"q0": 1, "q1": 1, "q2": 1})
    with pytest.raises(InputError, match="3 clusters for 80"):
        compare(runs, qrels, ["AP"], clusters=["a", "b", "c"])
    with pytest.raises(InputError, match="at least 2"):
        compare(runs, qrels, ["AP"], clusters=["a"] * 80)
    with pytest.raises(InputError, match="at least 2"):
        compare(runs, {"q0": qrels["q0"]}, ["AP"])
    with pytest.raises(InputError, match="none of the 1 judged"):
        compare(runs, {"elsewhere": {"d": 1}}, ["AP"])


def test_unknown_rows_are_named(comparison):
    with pytest.raises(InputError, match="there are weak, strong, again"):
        comparison.row("bm25")
    with pytest.raises(InputError, match="was not measured"):
        comparison.table("RR")
    with pytest.raises(InputError, match="no 'nDCG@10' of 'bm25'"):
        comparison.contrast("weak", "bm25")


def test_the_title_has_the_confidence_in_full():
    qrels = {f"q{i}": {"a": 1} for i in range(4)}
    run = Run.from_dict({q: {"a": 1.0} for q in qrels})
    found = compare([run], qrels, ["RR"], confidence=0.975)
    assert "97.5% bootstrap" in found.table().title
