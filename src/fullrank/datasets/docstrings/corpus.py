"""The documents of the built-in corpus: one for each documented function, class or method."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from fullrank.core.progress import progress
from fullrank.datasets.docstrings.modules import Definition, parse_package
from fullrank.datasets.docstrings.names import Names
from fullrank.datasets.docstrings.packages import Package
from fullrank.datasets.docstrings.see_also import DocParts, split_docstring


class Documented(NamedTuple):
    """One document and what it says about others."""

    title: str
    module: str
    parts: DocParts
    related: tuple[str, ...]
    """Titles of the documents that its See Also section names, sorted, never its own."""


def read_packages(packages: Sequence[Package], *, bar: bool = False) -> list[Documented]:
    """Documents of installed packages, sorted by title.

    Parameters
    ----------
    packages
        What to read.
    bar
        Whether to show a progress bar.
    """
    found: dict[str, Documented] = {}
    with (
        progress("read sources", len(packages), enabled=bar, unit="packages") as advance,
        _without_cycle_search(),
    ):
        for package in packages:
            for document in _documents(package):
                found.setdefault(document.title, document)
            advance(1)
    return [found[title] for title in sorted(found)]


@contextmanager
def _without_cycle_search() -> Iterator[None]:
    """Let Python not look for cyclic garbage: a quarter of the time, and syntax trees have none."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _documents(package: Package) -> Iterator[Documented]:
    names = Names(package.name, parse_package(package))
    definitions: dict[str, Definition] = {}
    for top in names.definitions():
        for definition in _with_members(top):
            title = names.public[definition.qualified]
            own = title.split(".")[-1 - definition.path.count(".") :]
            if definition.doc and not any(part.startswith("_") for part in own):
                definitions[definition.qualified] = definition
    for qualified, definition in definitions.items():
        parts = split_docstring(definition.doc)
        if not parts.text:
            continue
        targets = (names.resolve(name, definition) for name in parts.references)
        related = {
            names.public[t.qualified]
            for t in targets
            if t is not None and t.qualified in definitions and t is not definition
        }
        title = names.public[qualified]
        yield Documented(title, definition.module, parts, tuple(sorted(related - {title})))


def _with_members(definition: Definition) -> Iterator[Definition]:
    yield definition
    for member in definition.members.values():
        yield from _with_members(member)
