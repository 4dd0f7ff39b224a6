"""The examples run as a new user would run them, those that take seconds; the others compile."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"


def run(name, *arguments, folder):
    command = [sys.executable, FOLDER / name, *arguments]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def test_see_model(tmp_path):
    assert "open it in a browser" in run("see_model.py", folder=tmp_path)
    assert "<svg" in (tmp_path / "xray.html").read_text()


def test_train_galore(tmp_path):
    assert "bit by bit: True" in run("train_galore.py", "24", folder=tmp_path)


def test_train_adapter(tmp_path):
    pytest.importorskip("peft")
    assert "loads with plain PEFT" in run("train_adapter.py", folder=tmp_path)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.py")), ids=lambda file: file.stem)
def test_every_example_is_listed_and_compiles(file):
    assert file.name in (FOLDER / "README.md").read_text()
    compile(file.read_text(), str(file), "exec")
