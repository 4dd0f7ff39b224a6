"""`fullrank methods`: the catalogue."""

from __future__ import annotations

from typing import Annotated

import typer


def methods(
    verb: Annotated[
        str | None, typer.Argument(help="see, train, shrink or order; all by default.")
    ] = None,
    planned: Annotated[
        bool, typer.Option(help="Also those that this version does not have yet.")
    ] = True,
) -> None:
    """List the forty methods: what each is for, where it lives, which are there yet."""
    from rich.console import Console

    from fullrank.catalogue import METHODS, VERBS
    from fullrank.core.errors import InputError
    from fullrank.core.table import Table

    if verb is not None and verb not in VERBS:
        raise InputError(f"verb {verb!r}; it is one of {', '.join(VERBS)}")
    chosen = [m for m in METHODS if verb in (None, m.verb) and (planned or m.available)]
    there = sum(m.available for m in chosen)
    Console().print(
        Table(
            ["verb", "method", "what it is for", "entry point", "arXiv", "status"],
            [
                [m.verb, m.slug, m.purpose, m.entry, m.arxiv, "there" if m.available else "planned"]
                for m in chosen
            ],
            title=f"{there} of {len(chosen)} are there",
        )
    )
