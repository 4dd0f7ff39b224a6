"""The files of the search page, and the reports served beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import FileResponse, Response

from fullrank.serve.guard import REPORT_POLICY

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True)
class _File:
    content: bytes
    media_type: str
    etag: str

    def answer(self, request: Request) -> Response:
        """Send the file, or say that the browser's copy is still good."""
        headers = {"etag": self.etag, "cache-control": "no-cache"}
        if request.headers.get("if-none-match") == self.etag:
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


def _static_files() -> dict[str, _File]:
    """Read the package's few files into memory: then no path from a request meets the disk."""
    files = {}
    for entry in (resources.files("fullrank.serve") / "static").iterdir():
        if media_type := _TYPES.get(Path(entry.name).suffix):
            content = entry.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
            files[entry.name] = _File(content, media_type, etag)
    return files


def page_routes(reports: Mapping[str, Path]) -> APIRouter:
    """Routes of the search page (``/``), the API's description (``/docs``) and the reports.

    Parameters
    ----------
    reports
        URL path -> an HTML file, read when it is asked for.
    """
    router = APIRouter(include_in_schema=False)
    files = _static_files()

    def serve_file(path: str, file: _File) -> None:
        async def page(request: Request) -> Response:
            return file.answer(request)

        router.add_api_route(path, page, methods=["GET"])

    def serve_report(path: str, source: Path) -> None:
        async def report() -> Response:
            if not source.is_file():
                raise HTTPException(404, f"{source.name} is no longer there")
            return FileResponse(
                source,
                media_type=_TYPES[".html"],
                headers={"content-security-policy": REPORT_POLICY, "cache-control": "no-cache"},
            )

        router.add_api_route(path, report, methods=["GET"])

    serve_file("/", files["index.html"])
    serve_file("/docs", files["docs.html"])
    serve_file("/favicon.ico", files["favicon.svg"])
    for name, file in files.items():
        if not name.endswith(".html"):
            serve_file(f"/static/{name}", file)
    for path, source in reports.items():
        serve_report(path, source)
        # Reports link to each other as the files they are.
        serve_report(f"{path}.html", source)
    return router
