"""Stop early, and say why, on a Python that is too old."""

import sys

if sys.version_info < (3, 11):  # noqa: UP036 - this is what finds out
    sys.exit(
        f"fullrank needs Python 3.11 or newer, this is {sys.version.split()[0]}.\n"
        "Name another one: make PYTHON=python3.12 ..."
    )
