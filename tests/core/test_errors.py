"""Errors, and asking for optional libraries."""

import sys

import pytest

from fullrank.core import (
    FullrankError,
    InputError,
    MissingExtraError,
    PlanError,
    StoreError,
    require,
)


def test_what_is_there_is_imported():
    assert require("json.decoder", extra="search") is sys.modules["json.decoder"]


def test_what_is_absent_names_its_extra(monkeypatch):
    for module in ("no_such_library", "no_such_library.inner"):
        with pytest.raises(MissingExtraError, match=r"'no_such_library'.*'fullrank\[search\]'"):
            require(module, extra="search")
    monkeypatch.setitem(sys.modules, "json", None)
    with pytest.raises(MissingExtraError, match=r"'json'.*'fullrank\[hf\]'"):
        require("json", extra="hf")


def test_a_broken_library_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import what_it_needs\n")
    (tmp_path / "broken_library.py").write_text("raise RuntimeError('wrong processor')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs") as caught:
        require("half_installed", extra="search")
    assert not isinstance(caught.value, MissingExtraError)
    with pytest.raises(RuntimeError, match="wrong processor"):
        require("broken_library", extra="search")


def test_users_catch_one_base_or_pythons_own():
    for error, builtin in ((InputError, ValueError), (PlanError, ValueError)):
        assert issubclass(error, FullrankError)
        assert issubclass(error, builtin)
    assert issubclass(MissingExtraError, ImportError)
    assert issubclass(StoreError, FullrankError)
