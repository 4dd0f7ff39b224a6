"""`python_source`: the Python sources on this machine, to train language models on."""

from __future__ import annotations

import random
from collections.abc import Sequence

from fullrank.core.errors import InputError
from fullrank.datasets.docstrings.duplicates import Groups, near_identical
from fullrank.datasets.docstrings.modules import source_files
from fullrank.datasets.docstrings.packages import default_packages, find_packages
from fullrank.datasets.texts import Texts

# Shares of the bytes.
_SHARES = {"dev": 0.05, "test": 0.05}
# A longer file is a table of data more often than code.
_LONGEST = 200_000


def python_source(
    packages: Sequence[str] | None = None, *, size: int | None = 8_000_000, seed: int = 0
) -> Texts:
    """Make a corpus of source code from installed Python packages, which are read, never run.

    A document is a file. Files are drawn at random until there are ``size`` bytes; those that are
    nearly the same (vendored copies, generated code) are in one part, so that what is measured
    was not trained on.

    Parameters
    ----------
    packages
        Names as one installs or imports them; by default those of numpy, scipy, scikit-learn and
        networkx that are installed.
    size
        Bytes to keep, about; None keeps everything. 8 MB by default.
    seed
        Of the draw and the parts.

    Returns
    -------
    Texts
        90 % train, 5 % dev, 5 % test, with a manifest of versions and the SHA-256.

    Raises
    ------
    InputError
        When a package is not installed, or there is less text than three parts need.

    Examples
    --------
    >>> texts = python_source(["networkx"], size=200_000)
    >>> list(texts.parts)
    ['train', 'dev', 'test']
    """
    if size is not None and size < 1000:
        raise InputError(f"size={size}; expected bytes, at least 1000, or None for all")
    found = default_packages() if packages is None else find_packages(packages)
    files: list[str] = []
    for package in found:
        for path, name, _ in source_files(package):
            try:
                text = path.read_text(encoding="utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip() and len(text) <= _LONGEST:
                files.append(f"# {name}\n{text}")
    chosen = _draw(files, size, seed)
    parts = _divide(chosen, seed)
    texts = Texts("python_source", parts)
    manifest = {
        "name": "python_source",
        "packages": {package.name: package.version for package in sorted(found)},
        "files": len(chosen),
        "bytes": {part: texts.size(part) for part in parts},
        "seed": seed,
        "sha256": texts.fingerprint,
    }
    return Texts("python_source", parts, manifest)


def _draw(files: list[str], size: int | None, seed: int) -> list[str]:
    files = sorted(files)
    random.Random(seed).shuffle(files)
    if size is None:
        return files
    chosen, held = [], 0
    for text in files:
        if held + len(text) <= size:
            chosen.append(text)
            held += len(text)
    return chosen


def _divide(files: Sequence[str], seed: int) -> dict[str, tuple[str, ...]]:
    """Put whole groups of near-identical files into the part that lacks most."""
    groups = Groups(len(files))
    for a, b in near_identical(files):
        groups.join(a, b)
    members: dict[int, list[int]] = {}
    for row in range(len(files)):
        members.setdefault(groups.find(row), []).append(row)
    order = list(members.values())
    random.Random(seed).shuffle(order)
    total = sum(map(len, files))
    rows: dict[str, list[int]] = {"train": [], "dev": [], "test": []}
    wanted = {part: share * total for part, share in _SHARES.items()}
    for group in order:
        size = sum(len(files[row]) for row in group)
        # A file goes to a small part only where it fits, so that no part is one long file.
        part = next((p for p, left in wanted.items() if size <= left), "train")
        if part in wanted:
            wanted[part] -= size
        rows[part] += group
    return {part: tuple(files[row] for row in sorted(chosen)) for part, chosen in rows.items()}
