"""`fullrank methods`: the catalogue."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from fullrank.core.table import Table, wide_console

if TYPE_CHECKING:
    from fullrank.catalogue import Method

# Characters in which every column but the purpose is whole.
_WIDE = 150


def methods(
    verb: Annotated[
        str | None, typer.Argument(help="see, train, shrink or order; all by default.")
    ] = None,
    planned: Annotated[
        bool, typer.Option(help="Also those that this version does not have yet.")
    ] = True,
) -> None:
    """List the forty methods: what each is for, where it lives, which are there yet."""
    from fullrank.catalogue import METHODS, VERBS
    from fullrank.core.errors import InputError

    if verb is not None and verb not in VERBS:
        raise InputError(f"verb {verb!r}; it is one of {', '.join(VERBS)}")
    chosen = [m for m in METHODS if verb in (None, m.verb) and (planned or m.available)]
    there = sum(m.available for m in chosen)
    console = wide_console()
    shown = _wide if console.width >= _WIDE else _narrow
    console.print(replace(shown(chosen), title=f"{there} of {len(chosen)} are there"))


def _wide(chosen: list[Method]) -> Table:
    """One line a method where there is room, as in a file that is searched line by line."""
    return Table(
        ["verb", "method", "what it is for", "entry point", "arXiv", "status"],
        [[m.verb, m.slug, m.purpose, m.entry, m.arxiv, _status(m)] for m in chosen],
    )


def _narrow(chosen: list[Method]) -> Table:
    """Stacked, so that no name is broken: a part of one can neither be typed nor copied."""
    return Table(
        ["method, verb, status", "what it is for (arXiv), where to start"],
        [
            [f"{m.slug}\n{m.verb}, {_status(m)}", f"{m.purpose} ({m.arxiv})\n{m.entry}"]
            for m in chosen
        ],
    )


def _status(method: Method) -> str:
    return "there" if method.available else "planned"
