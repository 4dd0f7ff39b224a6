"""What the tests of the server share."""

import contextlib
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from serve_fakes import FakeIndex

SCRIPT = Path(__file__).with_name("serve_fakes.py")


@pytest.fixture
def index() -> FakeIndex:
    return FakeIndex()


@contextlib.contextmanager
def running_server(*arguments: str):
    """Serve the small index in a process of its own; yields the process and its address."""
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        found = re.search(r"http://[0-9.:]+", line)
        assert found, f"the server did not start: {line!r}"
        yield process, found[0]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()


@pytest.fixture
def server():
    return running_server
