"""What stands in front of every request: who asks, how much, and what the answer always carries."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Sequence
from typing import Final

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fullrank.serve.limits import Limits

logger = logging.getLogger("fullrank.serve")

PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
"""Content security policy of the search page: nothing inline, nothing from elsewhere."""

REPORT_POLICY: Final = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
"""Policy of a self-contained report: its own styles and pictures, and no script at all."""

_HOST: Final = re.compile(r"(\[[0-9a-f:.]+\]|[^:\[\]]+)(?::[0-9]+)?")
_HEADERS: Final = {
    "content-security-policy": PAGE_POLICY,
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
    "cache-control": "no-store",
}


class RefusedError(HTTPException):
    """A request that is not let through: HTTP status, word for programs, sentence for people."""

    def __init__(self, status: int, error: str, detail: str) -> None:
        # What is left of a body is not read, so its connection cannot be used again.
        close = {"connection": "close"} if status in (408, 413) else None
        super().__init__(status, detail, close)
        self.error = error


class Guard:
    """ASGI middleware: checks host and sizes, sets headers, and turns crashes into JSON.

    Parameters
    ----------
    app
        The application behind it.
    limits
        Bounds on URL and body.
    allowed_hosts
        Names that the ``Host`` header may carry, or None for any. A page elsewhere can let its
        own name resolve to this machine (DNS rebinding) and so read what is served here, unless
        the name is checked.
    """

    def __init__(self, app: ASGIApp, limits: Limits, allowed_hosts: Sequence[str] | None) -> None:
        self._app = app
        self._limits = limits
        self._hosts = None if allowed_hosts is None else frozenset(map(str.lower, allowed_hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        head = scope["method"] == "HEAD"
        started = False

        async def answer(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            elif head and message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        try:
            self._check(scope)
            # Everything that answers GET answers HEAD, with the same headers and no body.
            inner = {**scope, "method": "GET"} if head else scope
            await self._app(inner, self._bounded(scope, receive), answer)
        except RefusedError as refused:
            if not started:
                await _refuse(answer, refused)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if not started:
                await _refuse(
                    answer, RefusedError(500, "internal", "the server failed; see its log")
                )

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._hosts is not None:
            host = _HOST.fullmatch(headers.get("host", "").lower())
            if host is None or host[1] not in self._hosts:
                raise RefusedError(
                    400,
                    "unknown_host",
                    f"this server answers as {', '.join(sorted(self._hosts))} only",
                )
        size = len(scope["raw_path"]) + len(scope["query_string"])
        if size > self._limits.max_url:
            raise RefusedError(
                414,
                "url_too_long",
                f"path and query take {size} bytes; at most {self._limits.max_url}",
            )
        length = headers.get("content-length", "0")
        # uvicorn has already refused lengths that are no number.
        if length.isascii() and length.isdigit() and int(length[:20]) > self._limits.max_body:
            raise self._too_large()

    def _too_large(self) -> RefusedError:
        return RefusedError(
            413, "body_too_large", f"the body takes at most {self._limits.max_body} bytes"
        )

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Count the body as it comes: not every request says beforehand how long it is."""
        taken, more = 0, True

        async def bounded() -> Message:
            nonlocal taken, more
            if not more:
                return await receive()
            try:
                async with asyncio.timeout(self._limits.patience):
                    message = await receive()
            except TimeoutError:
                raise RefusedError(
                    408, "body_too_slow", f"the body takes at most {self._limits.patience:g} s"
                ) from None
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                more = message.get("more_body", False)
                if taken > self._limits.max_body:
                    raise self._too_large()
            return message

        return bounded


async def _refuse(send: Send, refused: RefusedError) -> None:
    body = json.dumps({"error": refused.error, "detail": refused.detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(k.encode(), v.encode()) for k, v in (refused.headers or {}).items()]
    await send({"type": "http.response.start", "status": refused.status_code, "headers": headers})
    await send({"type": "http.response.body", "body": body})
