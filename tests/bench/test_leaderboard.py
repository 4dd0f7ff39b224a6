"""From runs to rows, tables and pictures."""

import warnings

import pytest

from fullrank.bench.leaderboard import Found, Leaderboard, rows_of, steps_to
from fullrank.bench.plot import Point, loss_against_state, scatter
from fullrank.bench.sizes import size_of


def run(loss, *curve, state=800):
    if loss is None:
        return {"loss": None, "why": "training diverged"}
    points = [[step, value] for step, value in curve]
    return {"loss": loss, "curve": points, "state_bytes": state, "steps": 100, "tokens": 6400}


ADAMW = Found(
    "AdamW",
    0.003,
    [run(2.0, (0, 8.0), (50, 3.0), (100, 2.0)), run(2.2, (0, 8.0), (50, 3.2), (100, 2.2))],
    time={"passes": 9.0, "optimizer": 1.0},
    memory={"peak_bytes": 5000},
)
MUON = Found(
    "Muon",
    0.01,
    [run(1.5, (0, 8.0), (50, 2.6), (100, 1.6), state=400)],
    note="edge",
    time={"passes": 9.0, "optimizer": 11.0},
)
SLOW = Found("SGD", 0.1, [run(3.0, (0, 8.0), (100, 3.0), state=400)])
HALF = Found("MKOR", 0.1, [run(2.0, (0, 8.0), (100, 2.0)), run(None)])
NOTHING = Found("LIFT", None, [], note="diverged at every rate")
PENDING = Found("AdamP", None, [])


@pytest.fixture
def rows():
    return {row.optimizer: row for row in rows_of([NOTHING, SLOW, PENDING, MUON, HALF, ADAMW])}


def test_the_best_come_first_and_those_without_a_loss_last(rows):
    assert list(rows)[:3] == ["Muon", "AdamW", "SGD"]
    assert rows["AdamW"].bits_per_byte == pytest.approx(2.1)
    assert rows["AdamW"].spread == pytest.approx(0.02**0.5)
    assert rows["Muon"].spread is None
    assert (rows["AdamW"].seeds, rows["AdamW"].steps, rows["AdamW"].tokens) == (2, 100, 6400)


def test_time_to_the_loss_of_adamw_is_steps_times_measured_milliseconds(rows):
    # AdamW's own: all of its steps.
    assert rows["AdamW"].steps_to_baseline == 100
    assert rows["AdamW"].seconds_to_baseline == pytest.approx(1.0)
    # Muon's curve is at 2.1 halfway between 50 and 100 steps.
    assert rows["Muon"].steps_to_baseline == pytest.approx(75)
    assert rows["Muon"].seconds_to_baseline == pytest.approx(75 * 20e-3)
    assert rows["SGD"].steps_to_baseline is None
    assert rows["SGD"].seconds_to_baseline is None


def test_a_seed_that_diverged_leaves_no_mean(rows):
    assert rows["MKOR"].bits_per_byte is None
    assert rows["MKOR"].note == "diverged on 1 of 2 seeds"
    assert rows["MKOR"].steps_to_baseline is None


def test_without_adamw_nothing_is_timed_against_it():
    assert rows_of([MUON])[0].steps_to_baseline is None


def test_curves_of_seeds_are_averaged_where_all_were_measured():
    found = Found("x", 0.1, [run(1.0, (0, 8.0), (50, 4.0)), run(1.0, (0, 6.0))])
    assert found.curve == [(0, 7.0)]
    assert steps_to([(0, 7.0)], 7.0) == 0


def test_the_table_says_steps_tokens_and_what_is_missing(rows):
    board = Leaderboard(
        size_of("tiny"), {"abc": list(rows.values())}, {"abc": {"packages": {"numpy": "2.0"}}}
    )
    table = board.table("abc")
    cells = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    assert cells["AdamW"]["steps"] == 100
    assert cells["AdamW"]["tokens"] == 6400
    assert cells["AdamW"]["/ AdamW's"] == 1.0
    assert cells["Muon"]["/ AdamW's"] == 0.5
    assert cells["Muon"]["lr"] == "0.01 (edge)"
    assert cells["LIFT"]["lr"] == "diverged at every rate"
    assert cells["AdamP"]["bits per byte"] is None
    text = board.markdown()
    assert "abc: packages: numpy 2.0" in text
    assert "width 96, 2 layers" in text
    assert board.to_json()["rows"]["abc"][0]["optimizer"] == "Muon"


def test_a_single_place_on_a_logarithmic_axis_is_drawn_without_a_warning():
    pytest.importorskip("matplotlib")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.simplefilter("error", RuntimeWarning)
        picture = scatter([Point(46.4660327026524, 2, 0, "one")], "t", ("x", "y"), log=True)
    assert b"one" in picture


def test_the_picture_names_those_that_have_a_loss_and_is_the_same_twice(rows):
    pytest.importorskip("matplotlib")
    picture = loss_against_state(list(rows.values()), "abc")
    text = picture.decode()
    assert "<svg" in text
    assert "Muon" in text
    assert "optimizer state, MiB" in text
    assert "LIFT" not in text
    assert loss_against_state(list(rows.values()), "abc") == picture
