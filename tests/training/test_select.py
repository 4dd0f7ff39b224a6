"""Choosing a checkpoint by RankMe instead of by the development metric."""

import pytest

from fullrank.core import InputError
from fullrank.training import EncoderTraining, TrainingHistory
from fullrank.training.history import EvaluationRecord


@pytest.fixture
def history():
    found = TrainingHistory("nDCG@10", select="rankme")
    for step, metric, rankme in ((0, 0.40, 200.0), (10, 0.45, 190.0), (20, 0.42, 210.0)):
        found.evaluations.append(EvaluationRecord(step, metric, rankme, float(step), 1.0))
    return found


def test_the_highest_rankme_is_best_whatever_the_metric(history):
    assert history.best.step == 20
    assert history.since_best == 0
    assert history.gain == pytest.approx(0.02)
    history.select = "metric"
    assert history.best.step == 10
    assert history.since_best == 1


def test_it_is_kept_with_the_history(history):
    again = TrainingHistory.from_json(history.to_json())
    assert again == history
    old = history.to_json()
    del old["select"]
    assert TrainingHistory.from_json(old).best.step == 10


def test_the_setting_is_checked():
    assert EncoderTraining(select="rankme").as_dict()["select"] == "rankme"
    with pytest.raises(InputError, match="select 'labels'"):
        EncoderTraining(select="labels")
