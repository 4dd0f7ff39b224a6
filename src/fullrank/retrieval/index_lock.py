"""Who may write to an index folder, and which generations are being read."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fullrank.core.errors import LockedError, StoreError, require

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
    filelock = require("filelock", extra="search")
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


class ReadHold:
    """Keeps a generation's folder from being removed while something reads it.

    A shared lock of the system on the folder itself, which needs no right to write and ends with
    its process. It is released when the object is collected.
    """

    def __init__(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._finalizer = weakref.finalize(self, os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # a writer is about to remove it
            self.release()
            raise FileNotFoundError(f"{folder} is being removed") from None
        except OSError:  # a file system without such locks
            return
        # Removed between being opened and being locked?
        try:
            gone = not os.path.samestat(os.fstat(descriptor), folder.stat())
        except FileNotFoundError:
            gone = True
        if gone:
            self.release()
            raise FileNotFoundError(f"{folder} was removed")

    def release(self) -> None:
        """Let go; doing so twice does no harm."""
        self._finalizer()


def remove_unless_read(folder: Path) -> bool:
    """Remove a generation's folder, except while some process reads it; tell whether it went."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        shutil.rmtree(folder, ignore_errors=True)
        return not folder.exists()
    finally:
        os.close(descriptor)
