"""Two systems query by query."""

import pytest

from fullrank.core import InputError
from fullrank.evaluate import contrast


def test_wins_ties_and_losses():
    base = {"a": 0.5, "b": 0.5, "c": 0.5, "d": 0.1 + 0.2, "e": 0.0}
    values = {"e": 0.9, "a": 0.6, "b": 0.4, "c": 0.1, "d": 0.3}
    found = contrast(values, base)
    assert (found.wins, found.ties, found.losses) == (2, 1, 2)
    assert [d.query for d in found.gains] == ["e", "a"]
    assert [d.query for d in found.drops] == ["c", "b"]
    assert found.gains[0].difference == 0.9
    assert [d.query for d in contrast(values, base, top=1).drops] == ["c"]
    assert contrast(values, base, top=0).gains == ()


def test_the_table_shows_texts_where_there_are_any():
    found = contrast({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.5})
    table = found.table({"a": "solve a system"})
    assert [row[0] for row in table.rows] == ["solve a system", "b"]
    assert table.title == "1 wins, 0 ties, 1 losses"
    assert "+1.0000" in table.markdown()


@pytest.mark.parametrize(
    ("values", "base", "top", "says"),
    [
        ({}, {}, 1, "no query"),
        ({"a": 1.0}, {"b": 1.0}, 1, "'a' is in one only"),
        ({"a": 1.0}, {"a": 1.0}, -1, "negative"),
    ],
)
def test_bad_input(values, base, top, says):
    with pytest.raises(InputError, match=says):
        contrast(values, base, top=top)
