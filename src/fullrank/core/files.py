"""Files that are written whole or not at all."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(path: Path) -> None:
    """Make renames inside a folder survive a power cut (where the system can)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def atomic_write(path: str | Path, data: bytes) -> Path:
    """Write a file under a temporary name, flush it to disk, then rename it into place.

    A reader sees the old file or the new one; a crash, a full disk or Ctrl-C leaves the old one.

    >>> import tempfile
    >>> target = atomic_write(Path(tempfile.mkdtemp()) / "a.txt", b"hello")
    >>> target.read_bytes()
    b'hello'
    """

    def write(temporary: Path) -> None:
        with temporary.open("xb") as file:
            file.write(data)

    return atomic_write_by(path, write)


def atomic_write_by(path: str | Path, write: Callable[[Path], None]) -> Path:
    """Let a function write a file under a temporary name; flush it, then rename it into place.

    For writers that take a path and no bytes.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_folder(target.parent)
    except BaseException as error:
        # Where the folder could not be made there is nothing to remove.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and _of(error, temporary, *target.parents):
            raise _unwritable(target, error) from error
        raise
    return target


def _of(error: OSError, *paths: Path) -> bool:
    """Whether an error is of one of these; a writer may fail on a file of its own."""
    named = error.filename is not None
    return error.errno is not None and (not named or Path(str(error.filename)) in paths)


def _unwritable(target: Path, error: OSError) -> OSError:
    """Name the file that was to be written; nobody knows the temporary one."""
    told = type(error)(
        f"cannot write {target} ({error.strerror}); give another place, or make room there"
    )
    told.errno = error.errno
    return told
