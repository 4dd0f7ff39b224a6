"""The folder of an index: numbered generations, of which the manifest names the current one.

A generation is written beside the old one and never changed afterwards. Only when all of it is on
disk, the manifest is replaced, in one step; then old generations go, except those still read.
Whatever interrupts this leaves the index as it was.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fullrank.core.errors import FullrankError, StoreError
from fullrank.core.files import sync_folder
from fullrank.core.locking import LOCK, OWNER
from fullrank.retrieval.index_manifest import (
    MANIFEST,
    DamagedIndexError,
    FileRecord,
    Manifest,
    read_manifest,
    write_manifest,
)
from fullrank.retrieval.index_reading import ReadHold, remove_unless_read

GENERATIONS = "generations"
WORK = ".work"
_OURS = {MANIFEST, LOCK, OWNER, GENERATIONS, WORK}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def generation_folder(folder: Path, number: int) -> Path:
    """Where a generation is."""
    return folder / GENERATIONS / f"{number:06d}"


def prepare(folder: Path) -> None:
    """Make a folder for an index, or make sure that an existing one may become or is one.

    Raises
    ------
    StoreError
        When the folder holds something else, or an index that a newer version wrote.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise StoreError(f"cannot make the folder {folder}: {error.strerror}") from error
    foreign = {n for n in names - _OURS if not n.startswith(f".{MANIFEST}.")}
    if foreign and MANIFEST not in names:
        raise StoreError(
            f"{folder} is not empty and no index (it holds {min(foreign)!r}); "
            "give a new or an empty folder"
        )
    if MANIFEST in names:
        try:
            read_manifest(folder)
        except DamagedIndexError:
            # Ours, and to be created again? Or something else of that name, to be left alone?
            if LOCK not in names:
                raise


@contextmanager
def reading(generation: Path, what: str) -> Iterator[None]:
    """Say of which index something cannot be read, and why.

    Sizes are checked when an index is opened, so what fails here was changed or removed since.

    Raises
    ------
    StoreError
        For whatever a library makes of a file that is absent or not what was written.
    """
    folder = generation.parent.parent
    try:
        yield
    except FullrankError:
        raise
    except (OSError, ValueError, RuntimeError, LookupError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise StoreError(f"cannot read {what} of the index {folder}: {reason}") from error
        raise DamagedIndexError(folder, f"{what} cannot be read ({reason})") from error


def open_current(folder: Path) -> tuple[Manifest, ReadHold]:
    """Read the manifest and hold its generation, whatever a writer does meanwhile.

    Raises
    ------
    StoreError
        When there is no index, or when a file is missing or of another size than was written.
    """
    number = -1
    while True:
        manifest = read_manifest(folder)
        generation = generation_folder(folder, manifest.generation)
        try:
            hold = ReadHold(generation)
        except OSError as error:
            if manifest.generation != number:  # replaced between the two steps: once more
                number = manifest.generation
                continue
            reason = f"generation {manifest.generation} is missing or unreadable"
            raise DamagedIndexError(folder, reason) from error
        for name, record in manifest.files.items():
            try:
                size = (generation / name).stat().st_size
            except OSError:
                raise DamagedIndexError(folder, f"{name} is missing") from None
            if size != record.size:
                reason = f"{name} has {size:,} bytes, {record.size:,} were written"
                raise DamagedIndexError(folder, reason)
        return manifest, hold


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Read every file of the current generation and compare its checksum.

    Raises
    ------
    StoreError
        For the first file that is not as it was written.
    """
    generation = generation_folder(folder, manifest.generation)
    for name, record in manifest.files.items():
        try:
            found = _hash(generation / name, sync=False)
        except OSError as error:
            raise DamagedIndexError(folder, f"{name}: {error.strerror}") from error
        if found != record:
            raise DamagedIndexError(folder, f"{name} is not what was written")


@contextmanager
def new_generation(folder: Path) -> Iterator[tuple[int, Path]]:
    """Give a number and an empty folder to write into; removed when that fails.

    Call within :func:`~fullrank.core.locking.write_lock`, and :func:`commit` last.

    Raises
    ------
    StoreError
        When something cannot be written, e.g. because the disk is full.
    """
    home = folder / GENERATIONS
    part: Path | None = None
    try:
        try:
            home.mkdir(exist_ok=True)
            sweep(folder)  # what interrupted runs left
            number = 1 + max((int(p.name) for p in home.iterdir() if p.name.isdigit()), default=0)
            part = generation_folder(folder, number)
            part.mkdir()
            yield number, part
        except OSError as error:
            raise StoreError(_write_failure(folder, error)) from error
    except BaseException:
        if part is not None and not _is_current(folder, part):
            shutil.rmtree(part, ignore_errors=True)
        raise


def commit(folder: Path, manifest: Manifest, part: Path) -> Manifest:
    """Put a finished generation on disk for good, make it the current one."""
    files = {
        path.relative_to(part).as_posix(): _hash(path, sync=True)
        for path in sorted(part.rglob("*"))
        if path.is_file()
    }
    for path in (part, *(p for p in part.rglob("*") if p.is_dir()), part.parent):
        sync_folder(path)
    return write_manifest(folder, manifest.model_copy(update={"files": files}))


def sweep(folder: Path) -> None:
    """Remove what nothing needs any more; what cannot be removed now, a later write will.

    Call within :func:`~fullrank.core.locking.write_lock`.
    """
    keep = ""
    if (folder / MANIFEST).exists():
        try:
            keep = generation_folder(folder, read_manifest(folder).generation).name
        except StoreError:  # whatever there is may still be of use to someone
            return
    with suppress(OSError):
        for path in (folder / GENERATIONS).iterdir():
            if path.name != keep:
                remove_unless_read(path)
    for path in folder.glob(f".{MANIFEST}.*"):
        with suppress(OSError):
            path.unlink()


def _is_current(folder: Path, part: Path) -> bool:
    # An interruption may come after the swap: then the new generation is the index.
    try:
        return generation_folder(folder, read_manifest(folder).generation) == part
    except StoreError:
        return False


def _write_failure(folder: Path, error: OSError) -> str:
    if error.errno in _FULL:
        return (
            f"the disk is full while writing to {folder}; an index that was there is as it was: "
            "free some space and run it again, encoded texts are kept"
        )
    return f"cannot write to {folder}: {error}"


def _hash(path: Path, *, sync: bool) -> FileRecord:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
        if sync:
            os.fsync(file.fileno())
    return FileRecord(size=size, sha256=digest.hexdigest())
