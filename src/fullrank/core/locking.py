"""One writer of a folder at a time."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fullrank.core.errors import LockedError, StoreError

LOCK = ".fullrank.lock"
# Beside the lock, not in it: some versions of the library empty the lock file when they try it.
OWNER = ".fullrank.owner"


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """Be the only writer of a folder, or say at once who is.

    The system frees the lock when its process ends, however it ends.

    Raises
    ------
    LockedError
        When another process or thread is writing; it is never waited for.
    StoreError
        When the folder cannot be written to.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> with write_lock(folder):
    ...     with write_lock(folder):
    ...         pass
    Traceback (most recent call last):
        ...
    fullrank.core.errors.LockedError: ... is being written to by process ...
    """
    import filelock  # torch needs it too

    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"{folder} cannot be written to; check its permissions, or copy it")
    lock = filelock.FileLock(str(folder / LOCK), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise LockedError(
            f"{folder} is being written to by {_owner(folder)}; wait until it is done, or stop it"
        ) from None
    except OSError as error:
        raise StoreError(f"{folder} cannot be locked for writing: {error}") from error
    try:
        _sign(folder)
        yield
    finally:
        with suppress(OSError):
            (folder / OWNER).unlink(missing_ok=True)
        lock.release()


def _sign(folder: Path) -> None:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": now}
    with suppress(OSError):  # only a courtesy to whoever is turned away
        (folder / OWNER).write_text(json.dumps(owner), encoding="utf-8")


def _owner(folder: Path) -> str:
    try:
        owner = json.loads((folder / OWNER).read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} (since {owner['since']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
