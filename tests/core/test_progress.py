"""Progress bars show where a person looks, and nowhere else."""

import io
import sys

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


@pytest.mark.parametrize("total", [3, None])
def test_a_terminal_gets_a_bar_on_standard_error(monkeypatch, capsys, total):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress("encode", total=total, unit="docs") as advance:
        advance(2)
        advance(1)
    assert "encode" in sys.stderr.getvalue()
    assert capsys.readouterr().out == ""


def test_an_error_passes_through(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(KeyboardInterrupt), progress("encode", total=3):
        raise KeyboardInterrupt
