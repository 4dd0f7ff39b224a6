"""Installed packages whose sources can be read: found through their metadata, never imported."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from fullrank.core.errors import InputError

DEFAULT_PACKAGES = ("numpy", "scipy", "scikit-learn", "networkx")

_IN_RECORD = re.compile(r"^([A-Za-z]\w*)(?:/__init__)?\.py,", re.MULTILINE)
"""Top-level packages and modules in the RECORD of an installed distribution."""


class Package(NamedTuple):
    """A top-level package or module with Python sources."""

    name: str
    """The name in ``import name``."""
    version: str
    path: Path
    """Its folder, or its file when it is a single module."""


def find_packages(names: Sequence[str]) -> list[Package]:
    """Find packages, in this order, by the name one installs (``scikit-learn``) or imports.

    Raises
    ------
    InputError
        When one is not installed, or has no Python sources.
    """
    found = {package.name: package for name in names for package in _find(name)}
    return list(found.values())


def default_packages() -> list[Package]:
    """Those of numpy, scipy, scikit-learn and networkx that are installed.

    Raises
    ------
    InputError
        When none of them is.
    """
    found: list[Package] = []
    for name in DEFAULT_PACKAGES:
        try:
            found += _find(name)
        except InputError:
            continue
    if not found:
        raise InputError(
            f"none of the packages {', '.join(DEFAULT_PACKAGES)} is installed with its sources; "
            "install one of them, name others, or take every installed package"
        )
    return found


def every_package() -> list[Package]:
    """Every installed distribution's top-level packages and modules that have sources."""
    found: dict[str, Package] = {}
    for distribution in importlib.metadata.distributions():
        for name in _top_level(distribution):
            if name in ("test", "tests"):
                continue
            package = _locate(name, distribution.version)
            if package is not None:
                found.setdefault(name, package)
    return sorted(found.values())


def _find(name: str) -> list[Package]:
    try:
        distribution = importlib.metadata.distribution(name)
    except (importlib.metadata.PackageNotFoundError, ValueError):
        # Not a distribution's name; perhaps that of a package ("sklearn").
        candidates, version = [name], _version_of(name)
    else:
        candidates, version = _top_level(distribution), distribution.version
    found = [p for c in candidates if (p := _locate(c, version)) is not None]
    if not found:
        raise InputError(
            f"no package {name!r} with Python sources is installed here; expected the name of an "
            "installed package, e.g. 'numpy' or 'scikit-learn'"
        )
    return found


def _top_level(distribution: importlib.metadata.Distribution) -> list[str]:
    """Names that a distribution lets one import, read from its list of files."""
    listed = (distribution.read_text("top_level.txt") or "").split()
    # Searching the text is twenty times faster than the parsed list of files.
    names = listed or _IN_RECORD.findall(distribution.read_text("RECORD") or "")
    # An editable install lists no modules; its distribution's name is the best guess.
    names = names or [re.sub(r"[-.]+", "_", distribution.metadata["Name"] or "")]
    return sorted({n for n in names if n.isidentifier() and not n.startswith("_")})


def _locate(name: str, version: str) -> Package | None:
    """Where a top-level name lives. Looking it up on the path executes nothing."""
    if not name.isidentifier():
        return None
    try:
        spec = PathFinder.find_spec(name)
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    path = Path(spec.origin)
    return Package(name, version, path.parent if path.name == "__init__.py" else path)


def _version_of(name: str) -> str:
    """Version of the distribution that brings an import name; empty when none claims it."""
    for distribution in importlib.metadata.distributions():
        if name in _top_level(distribution):
            return distribution.version
    return ""
