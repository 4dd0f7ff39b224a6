"""Importing is instant: heavy libraries come when they are used."""

import importlib
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "sentence_transformers", "pandas", "scipy", "rich", "ir_measures")


@pytest.mark.parametrize(
    "statement",
    [
        "import fullrank",
        "from fullrank import Run, RankPlan",
        "from fullrank.core import Corpus, Run, RankPlan, PlanEntry, Table, atomic_write, capture",
        "from fullrank.core import progress, require, resolve_model, canonical_name, InputError",
        "from fullrank.core.rank_rules import Energy",
        "from fullrank.evaluate import compare, evaluate, floor_test, holm, randomisation_test",
    ],
)
def test_no_heavy_library_is_imported(statement):
    script = f"import sys\n{statement}\nprint([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["fullrank", "fullrank.core", "fullrank.evaluate"])
def test_every_public_name_is_there(package):
    module = importlib.import_module(package)
    assert module.__all__ == sorted(module.__all__)
    for name in module.__all__:
        if package != "fullrank":
            assert getattr(module, name) is not None
        assert name in dir(module)
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_a_name_spelled_like_its_module_is_what_the_module_defines():
    # Whichever way the module was imported first.
    script = (
        "import fullrank.core.capture, importlib\n"
        "importlib.import_module('fullrank.core.progress')\n"
        "from fullrank.core import capture, progress\n"
        "assert callable(capture) and callable(progress), (capture, progress)\n"
        "from fullrank.core.capture import capture as same\n"
        "assert capture is same\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
