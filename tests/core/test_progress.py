"""Progress bars show where a person looks, and nowhere else."""

import io
import sys
import time

import pytest

from fullrank.core import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_nothing_is_shown_where_nobody_looks(monkeypatch, capsys):
    with progress("encode", total=3) as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("encode", total=3, enabled=False) as advance:
        advance(3)
    assert sys.stderr.getvalue() == ""


def test_without_a_terminal_there_is_a_line_now_and_then(monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for total, enabled in ((100, True), (None, True), (100, False)):
        with progress("train", total, enabled, "%") as advance:
            for _ in range(100):
                clock[0] += 0.9
                advance(1)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 4
    assert lines[0] == "train: 34/100 %, elapsed 0:00:31, left 0:00:59"
    assert lines[2] == "train: 34 %, elapsed 0:00:31"


@pytest.mark.parametrize("total", [3, None])
def test_a_terminal_gets_a_bar_on_standard_error(monkeypatch, capsys, total):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("encode", total=total, unit="docs") as advance:
        advance(2)
        advance(1)
    assert "encode" in sys.stderr.getvalue()
    assert "elapsed" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""


def test_an_error_passes_through(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyboardInterrupt), progress("encode", total=3):
        raise KeyboardInterrupt
