"""Files that are written whole or not at all."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fullrank.core import atomic_write
from fullrank.core.files import sha256_file


def test_a_file_is_made_with_its_folders(tmp_path):
    path = atomic_write(tmp_path / "a" / "b.txt", b"one")
    assert path.read_bytes() == b"one"
    assert atomic_write(str(path), b"").read_bytes() == b""
    assert [p.name for p in path.parent.iterdir()] == ["b.txt"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch, error, step):
    path = atomic_write(tmp_path / "a.txt", b"old")

    def fail(*_):
        raise error

    owner = os if step == "fsync" else Path
    monkeypatch.setattr(owner, step, fail)
    with pytest.raises(type(error)):
        atomic_write(path, b"new and longer")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_target_that_cannot_be_written_is_named_not_its_temporary(tmp_path):
    (tmp_path / "file").write_text("")
    for target, kind in (
        (Path("/proc/x.run"), FileNotFoundError),
        (tmp_path / "file" / "x", OSError),
    ):
        with pytest.raises(kind) as told:
            atomic_write(target, b"new")
        assert str(told.value).startswith(f"cannot write {target} (")
        assert told.value.errno


def test_a_process_that_dies_leaves_the_old_file(tmp_path):
    path = atomic_write(tmp_path / "a.txt", b"old")
    script = (
        "import os, sys\n"
        "from fullrank.core.files import atomic_write\n"
        "os.fsync = lambda _: os._exit(9)\n"
        "atomic_write(sys.argv[1], b'new')\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    assert done.returncode == 9
    assert path.read_bytes() == b"old"


def test_a_folder_is_not_overwritten(tmp_path):
    with pytest.raises(OSError, match="directory"):
        atomic_write(tmp_path, b"x")
    assert not list(tmp_path.iterdir())


def test_sha256(tmp_path):
    data = b"x" * (3 << 20)
    (tmp_path / "a").write_bytes(data)
    assert sha256_file(tmp_path / "a") == hashlib.sha256(data).hexdigest()
