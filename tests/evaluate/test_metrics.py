"""Names of metrics."""

import ir_measures
import pytest

from fullrank.core import InputError
from fullrank.evaluate import parse_metric


@pytest.mark.parametrize(
    "name",
    [
        *("nDCG@10", "AP", "AP(rel=2)", "AP(rel=2)@100", "RR", "RR@10", "R@100", "P@10", "MRR"),
        *("nDCG(dcg='exp-log2')@5", "Judged@10", "IPrec@0.1", "P(judged_only=True)@5"),
        *("Bpref", " Success@5 "),
    ],
)
def test_names_mean_what_ir_measures_says(name):
    ours, theirs = parse_metric(name), ir_measures.parse_measure(name.strip())
    assert type(ours) is type(theirs)
    assert ours.params == theirs.params


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("ndcg@10", "did you mean nDCG"),
        ("nDGC@10", "did you mean nDCG"),
        ("precision@3", r"did you mean P\?"),
        ("Sucess@3", r"did you mean Success\?"),
        ("zzzzz", "known are"),
        ("nDCG@", "not the name of a metric"),
        ("", "not the name of a metric"),
        ("R@10@5", "not the name of a metric"),
        (7, "not the name of a metric"),
        ("P", "cutoff is missing"),
        ("nDCG@ten", "takes cutoff"),
        ("AP(rel=x)", "takes cutoff"),
        ("AP(2)", "name=value"),
        ("AP(**x)", "name=value"),
        ("AP(nothing=1)", "unsupported params"),
        ("nDCG@10.5", "invalid param cutoff"),
        ("nDCG@0", "at least 1"),
        ("nDCG@-1", "at least 1"),
        ("nDCG@True", "at least 1"),
        ("P@99999999999999999999", "at least 1"),
        ("NumRet", "averaged"),
        ("AP(rel=__import__('os').system('true'))", "cannot be read"),
    ],
)
def test_what_is_no_metric_is_refused_with_advice(name, says):
    with pytest.raises(InputError, match=says):
        parse_metric(name)
