"""One table, shown in four ways."""

import io
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullrank.core import InputError, Table
from fullrank.core.table import wide_console

TRICKY = 'a|b <script>alert("x")</script> & \n[bold]c[/bold]'


def rendered(table):
    from rich.console import Console

    console = Console(file=io.StringIO(), width=200, color_system=None)
    console.print(table)
    return console.file.getvalue()


def test_markdown_keeps_a_row_on_its_line():
    lines = Table(["x|y", "n"], [[TRICKY, 1], ["a\r\nb", 2]]).markdown().splitlines()
    assert len(lines) == 4
    assert lines[0] == r"| x\|y | n |"
    assert lines[2].startswith(r"| a\|b <script>")
    assert lines[3] == "| a b | 2 |"


@given(st.lists(st.lists(st.text(), min_size=2, max_size=2), max_size=3), st.text())
def test_html_is_well_formed_and_says_what_it_was_given(rows, title):
    table = Table(["one", "two"], rows, title=title)
    text = table.html()
    cells = [value for row in rows for value in row]
    if not any(ord(c) < 32 or 0xD7FF < ord(c) < 0xE000 or ord(c) > 0xFFFD for c in text):
        tree = ET.fromstring(text)
        assert [e.text or "" for e in tree.iter("td")] == cells
        assert (tree.findtext("caption") or "") == title
    assert "<script" not in Table([TRICKY], [[TRICKY]], title=TRICKY).html()


def test_numbers_stand_right_and_text_left():
    table = Table(
        ["name", "count", "share", "empty"], [["a", 1, 0.5, None], ["b", None, 1.0, None]]
    )
    assert table.markdown().splitlines()[1] == "|:---|---:|---:|---:|"
    assert table.html().count('<td class="num">') == 6


def test_formats():
    table = Table(
        ["share", "count", "p", "plain", "whole"],
        [[0.1234, 12345, 0.0001, 1.23456789, 7], [None, None, 0.5, 2.0, 8]],
        formats={"share": ".1%", "count": ",d", "p": lambda p: "small" if p < 0.01 else f"{p:.2f}"},
    )
    assert table.markdown().splitlines()[2:] == [
        "| 12.3% | 12,345 | small | 1.235 | 7 |",
        "|  |  | 0.50 | 2 | 8 |",
    ]


def test_the_terminal_shows_brackets_as_they_are():
    text = rendered(Table(["vs [base]"], [["[red]x[/red]"]], title="[lower, upper]"))
    for shown in ("vs [base]", "[red]x[/red]", "[lower, upper]"):
        assert shown in text


def test_names_are_whole_however_narrow_the_terminal(monkeypatch, capsys):
    from rich.console import Console

    names = [f"model.layers.0.self_attn.{part}_proj" for part in "qk"]
    table = Table(["matrix", "rank"], [[name, 12.5] for name in names])
    console = Console(width=24, record=True)
    console.print(table)
    text = "".join(c for c in console.export_text() if c.isalnum() or c in "._")
    assert "q_proj" in text
    assert "…" not in console.export_text()
    capsys.readouterr()
    monkeypatch.delenv("COLUMNS", raising=False)
    wide = Table([*map(str, range(9)), "matrix"], [[*["a long text"] * 9, names[0]]])
    wide_console().print(wide)
    assert names[0] in capsys.readouterr().out


def test_titles_frames_and_text():
    table = Table(["a", "b"], [["x", 0.25]], title="T")
    assert table.markdown().startswith("**T**\n\n| a | b |")
    assert str(table) == table.markdown()
    pytest.importorskip("pandas")
    assert table.frame().to_dict("records") == [{"a": "x", "b": 0.25}]


def test_no_rows():
    assert Table(["a"], []).markdown().splitlines() == ["| a |", "|---:|"]
    assert "<tbody></tbody>" in Table(["a"], []).html()


def test_ragged_rows_are_refused():
    with pytest.raises(InputError, match="a row of 1 cells under 2 columns"):
        Table(["a", "b"], [["x"]])
