"""Which generations of an index are being read."""

from __future__ import annotations

import fcntl
import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path


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
