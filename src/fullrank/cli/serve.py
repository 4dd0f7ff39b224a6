"""`fullrank serve`: a search page and a JSON API over an index."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    folder: Annotated[Path, typer.Argument(help="An index, or the folder of a demo.")],
    host: Annotated[
        str, typer.Option(help="Address to bind to; the default is this machine only.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=0, max=65535)] = 8000,
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open the page in a browser.")
    ] = False,
) -> None:
    """Serve a search page, and the same over a JSON API (described at /openapi.json).

    Example: fullrank serve notes.index --open
    """
    from fullrank.serve import serve as run

    run(folder, host=host, port=port, open_browser=open_browser)
