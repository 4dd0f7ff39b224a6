"""The exceptions of fullrank, and the one way to ask for an optional library.

Every message says what was wrong, what was expected and what to do. The command line turns a
:class:`FullrankError` into one line and exit code 2; anything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

import importlib
from typing import Any


class FullrankError(Exception):
    """Base of every error that a user can act on."""


class InputError(FullrankError, ValueError):
    """What was passed in cannot be worked on: the message names the value and what would do."""


class DivergedError(InputError):
    """A training's loss became infinite or not a number: its settings cannot be trained with."""


class PlanError(FullrankError, ValueError):
    """A :class:`~fullrank.core.RankPlan` that does not fit what it is applied to."""


class MissingExtraError(FullrankError, ImportError):
    """An optional library is not installed; the message names the extra that brings it."""


class StoreError(FullrankError):
    """A folder on disk that is not what it should be (absent, foreign, newer, damaged)."""


class LockedError(StoreError):
    """Another process is writing to the same folder."""


def require(module: str, extra: str) -> Any:
    """Import an optional library, or say which extra to install.

    Parameters
    ----------
    module
        Dotted name to import, e.g. ``"bm25s"``.
    extra
        The extra of fullrank that brings it, e.g. ``"search"``.

    Returns
    -------
    module
        The imported module.

    Raises
    ------
    MissingExtraError
        When the library is absent. A library that is present but fails to import raises its own
        error, so that a broken install is never mistaken for a missing one.

    Examples
    --------
    >>> require("json", extra="search").dumps([1])
    '[1]'
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        root = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != root:
            raise
        raise MissingExtraError(
            f"this needs the library {root!r}, which is not installed: "
            f"pip install 'fullrank[{extra}]'"
        ) from error
