"""What all tests share."""

import functools
import os
import shutil
from pathlib import Path

# Workers side by side, and the processes they start, must not each take all cores.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings
from tiny_models import save_encoder

# It is to show pages of ours, and to ask nobody for anything.
_CHROMIUM = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

# Property tests are the same on every machine and do not watch the clock.
settings.register_profile("fullrank", deadline=None, derandomize=True, database=None)
settings.load_profile("fullrank")


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data sets; tests marked `data` need it and are skipped without it."""
    folder = os.environ.get("FULLRANK_DATA")
    if not folder:
        pytest.skip("FULLRANK_DATA is not set")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_encoder(tmp_path_factory):
    """Folder of a random encoder of some words: made once, for all tests, which leave it alone."""

    @functools.cache
    def made(*words: str, layers: int = 1, length: int = 32) -> Path:
        folder = tmp_path_factory.mktemp("encoder")
        return save_encoder(folder, words, layers=layers, length=length)

    return made


# A file's, not the session's: as long as playwright runs, no test can run an event loop.
@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, driven by playwright."""
    found = next(filter(None, map(shutil.which, ["chromium", "chromium-browser", "chrome"])), None)
    if found is None:
        if os.environ.get("FULLRANK_REQUIRE_BROWSER") == "1":
            pytest.fail("FULLRANK_REQUIRE_BROWSER is set, but there is no chromium on the PATH")
        pytest.skip("no chromium on the PATH")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=found, args=_CHROMIUM)
        yield chromium
        chromium.close()


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
