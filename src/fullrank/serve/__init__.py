"""Serve an index: a search page, and the same over a documented JSON API."""

from typing import TYPE_CHECKING

from fullrank._lazy import lazy_exports

if TYPE_CHECKING:
    from fullrank.serve.app import create_app as create_app
    from fullrank.serve.current import Searchable as Searchable
    from fullrank.serve.limits import LOOPBACK_HOSTS as LOOPBACK_HOSTS
    from fullrank.serve.limits import Limits as Limits
    from fullrank.serve.server import serve as serve

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        **dict.fromkeys(["LOOPBACK_HOSTS", "Limits"], "limits"),
        "Searchable": "current",
        "create_app": "app",
        "serve": "server",
    },
)
