"""The demo's cache, charts and report page."""

import numpy as np
import pytest

from fullrank.core.errors import InputError
from fullrank.core.table import Table
from fullrank.demo import DemoConfig
from fullrank.demo.cache import Cache
from fullrank.demo.charts import Series, line_chart
from fullrank.demo.report import Example, Hit, Section, write_page


def test_an_entry_that_cannot_be_read_is_made_again(tmp_path):
    cache = Cache(tmp_path)
    key = cache.key("a", 1)
    assert key != cache.key("a", 2)
    made = cache.array(key, lambda: np.arange(6, dtype=np.float32).reshape(2, 3))
    assert cache.hits == 0
    np.testing.assert_array_equal(cache.array(key, lambda: made * 0), made)
    assert cache.hits == 1
    path = tmp_path / f"{key}.npy"
    path.write_bytes(path.read_bytes()[:-5])
    np.testing.assert_array_equal(cache.array(key, lambda: made + 1), made + 1)
    assert cache.hits == 1


def test_an_interrupted_entry_is_not_there(tmp_path):
    cache = Cache(tmp_path)

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.array(cache.key("x"), interrupted)
    assert list(tmp_path.iterdir()) == []


def test_without_a_folder_nothing_is_kept():
    cache = Cache(None)
    assert cache.array(cache.key("x"), lambda: np.ones(1, np.float32)).tolist() == [1.0]


def test_charts_are_svg_and_repeatable():
    series = [
        Series("ours", [0.5, 0.9], [0.97, 1.0], [0.95, 0.99], [0.97, 1.0]),
        Series("<usual>", [0.6, 0.9], [0.9, 0.99], dashed=True),
    ]

    def draw():
        return line_chart(series, x_label="kept", y_label="ratio", level=(0.97, "floor"))

    drawn = draw()
    assert drawn.startswith("<svg")
    assert "&lt;usual&gt;" in drawn
    assert "<script" not in drawn
    assert drawn == draw()


def test_the_page_escapes_what_it_is_given(tmp_path):
    bad = "<img src=x onerror=alert(1)>"
    section = (
        Section(bad, "one")
        .text(bad)
        .table(Table([bad], [[bad]]))
        .examples([Example(bad, [bad], {bad: [Hit(bad, True)]})])
    )
    page = write_page(tmp_path / "page.html", bad, bad, [section]).read_text()
    assert "<img" not in page
    assert "default-src 'none'" in page


@pytest.mark.parametrize("changes", [{"floor": 1.0}, {"floor": 0}, {"tokens": 4}, {"size": 10}])
def test_settings_out_of_range(changes):
    with pytest.raises(InputError):
        DemoConfig(**changes)
