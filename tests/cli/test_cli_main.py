"""The root command: help, version, the catalogue, and what becomes of errors."""

import signal
import subprocess
import sys
import time
import warnings

import pytest

from fullrank._version import __version__
from fullrank.catalogue import METHODS, VERBS, get
from fullrank.cli import main as cli
from fullrank.core.errors import InputError


def test_help_teaches_every_command(fullrank):
    shown = fullrank("--help")
    assert shown.code == 0
    for command in ("see", "train", "shrink", "order", "serve", "demo", "methods"):
        assert command in shown.out
        assert fullrank(command, "--help").code == 0


def test_version(fullrank):
    assert fullrank("--version").out.strip() == f"fullrank {__version__}"


def test_help_imports_no_torch():
    code = (
        "import sys; sys.argv = ['fullrank', '--help']\n"
        "from fullrank.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'lancedb', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_catalogue_is_complete(fullrank):
    assert len(METHODS) == len({m.slug for m in METHODS}) == 40
    assert {m.verb for m in METHODS} == set(VERBS)
    assert get("galore").available
    assert get("lord").available
    planned = [m.slug for m in METHODS if not m.available]
    with pytest.raises(KeyError, match="galore"):
        get("gallore")
    shown = fullrank("methods", "train")
    assert shown.code == 0
    assert "galore" in shown.out
    assert "rankme" not in shown.out
    there = fullrank("methods", "--no-planned").out
    assert f"{40 - len(planned)} of {40 - len(planned)} are there" in there
    assert "planned" not in there
    assert fullrank("methods", "sing").code == 2


def test_names_of_the_catalogue_are_whole_in_a_narrow_terminal(fullrank, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = fullrank("methods").out
    assert all(m.entry in shown and m.slug in shown for m in METHODS)
    monkeypatch.setenv("COLUMNS", "200")
    assert sum("│" in line for line in fullrank("methods").out.splitlines()) == len(METHODS)


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        (InputError("give a folder"), 2, "fullrank: give a folder"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_are_one_line_without_traceback(fullrank, monkeypatch, raised, code, said):
    monkeypatch.setattr("fullrank.catalogue.METHODS", _Failing(raised))
    found = fullrank("methods")
    assert found.code == code
    assert said in found.err
    assert "Traceback" not in found.err


def test_warnings_are_one_line_without_a_place(fullrank, monkeypatch):
    monkeypatch.setattr("fullrank.catalogue.METHODS", _Warning())
    assert fullrank("methods").err == "warning: 3 layers saw few samples\n"


def test_paragraphs_of_help_are_wrapped_by_the_terminal(fullrank, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = fullrank("see", "data", "--help").out
    assert "it pushes the weights, their effective rank in how many directions." in shown


class _Warning(list):
    def __iter__(self):
        warnings.warn("3 layers\n saw few samples", stacklevel=1)
        return super().__iter__()


class _Failing:
    def __init__(self, error):
        self.error = error

    def __iter__(self):
        raise self.error


def test_an_interrupt_in_a_destructor_is_not_lost(fullrank, monkeypatch):
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def command(**_):
        Dying()
        time.sleep(30)  # ends early

    monkeypatch.setattr(cli, "app", command)
    # A shell starts what runs in its background with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        found = fullrank("order")
    finally:
        signal.signal(signal.SIGINT, before)
    assert found.code == 130
    assert "interrupted" in found.err
    assert "Traceback" not in found.err


def test_debug_keeps_the_traceback(monkeypatch):
    monkeypatch.setattr("fullrank.catalogue.METHODS", _Failing(InputError("bad")))
    monkeypatch.setattr(sys, "argv", ["fullrank", "methods", "--debug"])
    with pytest.raises(InputError):
        cli.main()


def test_debug_may_be_switched_off_in_the_environment(monkeypatch, fullrank):
    monkeypatch.setenv("FULLRANK_DEBUG", "0")
    monkeypatch.setattr("fullrank.catalogue.METHODS", _Failing(InputError("bad")))
    assert fullrank("methods").code == 2


def test_unknown_options_and_commands_exit_with_2(fullrank):
    assert fullrank("nonsense").code == 2
    assert fullrank("methods", "--nonsense").code == 2
