"""What all tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets; tests marked `data` need it and are skipped without it."""
    folder = os.environ.get("FULLRANK_DATA")
    if not folder:
        pytest.skip("FULLRANK_DATA is not set")
    return Path(folder)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Where real data or a browser must be there, a test that skips for want of it fails."""
    outcome = yield
    report = outcome.get_result()
    required = [
        mark
        for mark in ("data", "browser")
        if item.get_closest_marker(mark) and os.environ.get(f"FULLRANK_REQUIRE_{mark.upper()}")
    ]
    if report.skipped and required:
        report.outcome = "failed"
        report.longrepr = f"skipped, but {required[0]} is required here: {report.longrepr}"
