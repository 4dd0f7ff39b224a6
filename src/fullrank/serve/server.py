"""Run the application: find what a folder holds, bind, serve until Ctrl-C."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import webbrowser
from pathlib import Path
from threading import Timer
from typing import Any

from fullrank.core.errors import InputError, StoreError, require
from fullrank.core.progress import progress
from fullrank.serve.limits import LOOPBACK_HOSTS

# A query of 100 kB in a URL, each byte escaped, must still reach the code that answers with JSON.
_MAX_REQUEST_HEAD = 512 * 1024


def is_loopback(host: str) -> bool:
    """Whether an address reaches this machine only.

    >>> is_loopback("localhost"), is_loopback("::1"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _parts(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Find the index and the reports in an index folder or in a demo's folder."""
    if not folder.is_dir():
        raise StoreError(f"{folder} is not a folder; give an index, or the folder of a demo")
    inner = folder / "index"
    reports = {
        f"{name}_html": folder / f"{name}.html"
        for name in ("xray", "report")
        if (folder / f"{name}.html").is_file()
    }
    return (inner if inner.is_dir() else folder), reports


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket, or raise :class:`InputError` with what to do.

    It listens at once: whoever comes while models are being loaded waits instead of being refused.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot serve at {host} port {port}: {error.strerror or error}; "
            "pass another --port (0 picks a free one) or --host"
        ) from error
    return listener


def serve(
    folder: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    open_browser: bool = False,
    **options: Any,
) -> None:
    """Serve a search page and a JSON API until Ctrl-C.

    Parameters
    ----------
    folder
        An index, or the folder of a demo (an index in ``index/``, reports beside it).
    host
        Address to bind to. The default is reached from this machine only; with any other, the
        ``Host`` header is not checked and everyone who reaches the address can search.
    port
        Port; 0 picks a free one.
    open_browser
        Open the page in a browser.
    **options
        Bounds, passed to :func:`create_app`.

    Raises
    ------
    StoreError
        When the folder holds no index.
    InputError
        When the address cannot be bound.
    """
    require("fastapi", extra="serve")
    from fullrank.retrieval import Index
    from fullrank.serve.app import create_app

    where, reports = _parts(Path(folder))
    listener = listen(host, port)
    try:
        if is_loopback(host):
            options.setdefault("allowed_hosts", sorted({*LOOPBACK_HOSTS, _url_host(host)}))
        else:
            options.setdefault("allowed_hosts", None)
        app = create_app(Index.open(where), **{**reports, **options})
        # A model that cannot be loaded stops here, and the first visitor need not wait for it.
        with progress("load the model", total=None):
            app.state.searcher.search("warm up", 1)
        if not is_loopback(host):
            print(f"Everyone who reaches {host} can search, and read every document.")
        url = f"http://{_url_host(host)}:{listener.getsockname()[1]}/"
        run(app, listener, url, open_browser)
    finally:
        listener.close()


def _url_host(host: str) -> str:
    return f"[{host.strip('[]')}]" if ":" in host else host


def run(app: Any, listener: socket.socket, url: str, open_browser: bool = False) -> None:
    """Run an application on a bound socket until Ctrl-C or SIGTERM, then let requests finish."""
    uvicorn = require("uvicorn", extra="serve")
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,  # queries are nobody else's business
        server_header=False,
        proxy_headers=False,
        http="h11",
        ws="none",
        h11_max_incomplete_event_size=_MAX_REQUEST_HEAD,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=3,
    )
    print(f"Search page at {url} (JSON API at {url}docs). Ctrl-C stops.", flush=True)
    if open_browser:
        timer = Timer(0.5, webbrowser.open, [url])
        timer.daemon = True
        timer.start()
    # uvicorn shuts down in order and then raises the signal again, for whoever else listens.
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
