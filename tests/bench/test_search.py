"""The grid of rates and the seeds at the best: what is due when, and what is told of it."""

import pytest

from fullrank.bench import Job, RateSearch, RunStore

RATES, SEEDS = (0.1, 0.3, 1.0), (0, 1, 2)


def job(rate, seed):
    return Job("train", {"lr": rate, "seed": seed})


@pytest.fixture
def search():
    return RateSearch(RATES, SEEDS, job)


@pytest.fixture
def store(tmp_path):
    store = RunStore(tmp_path / "bench")
    with store.writing():
        yield store


def add(store, losses, seed=0):
    for rate, loss in losses.items():
        store.add(job(rate, seed), {"loss": loss}, seconds=1.0)


def pairs(jobs):
    return [(j.settings["lr"], j.settings["seed"]) for j in jobs]


def test_seeds_wait_for_the_grid(search, store):
    assert pairs(search.due(store)) == [(0.1, 0), (0.3, 0), (1.0, 0)]
    add(store, {0.1: 3.0, 0.3: 2.0})
    assert search.best(store) is None
    assert search.runs(store) == []
    add(store, {1.0: None})
    assert search.best(store) == 0.3
    assert pairs(search.due(store))[3:] == [(0.3, 1), (0.3, 2)]
    assert search.finished(store) == 3
    assert search.total == 5
    add(store, {0.3: 2.5}, seed=1)
    assert [run["loss"] for run in search.runs(store)] == [2.0, 2.5]
    assert search.finished(store) == 4


@pytest.mark.parametrize(
    ("losses", "edge"), [((3, 2, 4), False), ((1, 2, 4), True), ((4, 3, 2), True)]
)
def test_a_best_rate_at_the_end_of_the_grid_is_told(search, store, losses, edge):
    add(store, dict(zip(RATES, map(float, losses), strict=True)))
    assert search.at_edge(store) is edge


def test_one_rate_has_no_edge(store):
    search = RateSearch((0.1,), (0,), job)
    add(store, {0.1: 2.0})
    assert search.best(store) == 0.1
    assert not search.at_edge(store)


def test_where_all_diverged_nothing_more_is_due(search, store):
    add(store, dict.fromkeys(RATES))
    assert search.diverged(store)
    assert search.best(store) is None
    assert len(search.due(store)) == 3
    assert search.finished(store) == search.total
