"""The HTTP application: search as JSON, and the page that shows it."""

# Annotations stay values here (no `from __future__ import annotations`): FastAPI reads them, and
# some name models that are made inside `create_app`, with the bounds of this application.

import asyncio
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Match

from fullrank._version import __version__
from fullrank.core.errors import FullrankError, InputError, MissingExtraError, StoreError
from fullrank.serve.current import Searchable
from fullrank.serve.guard import Guard, logger
from fullrank.serve.limits import LOOPBACK_HOSTS, BusyError, Gate, Limits
from fullrank.serve.models import (
    Bounds,
    DocumentResponse,
    Health,
    Problem,
    SearchResponse,
    SystemsResponse,
)
from fullrank.serve.pages import page_routes
from fullrank.serve.searching import Searcher, UnknownSystemError, printable

_DESCRIPTION = """\
Search an index and see how the answer came about: the score that each stage gave each document,
and the time each stage took. Every refusal is a JSON object with `error`, a word for programs, and
`detail`, a sentence for people.
"""

# Of a path in a sentence: all but the last name.
_FOLDERS = re.compile(r"(?<![^\s'\"(])/[^;:,()'\"\n]*/")

_NAMES = {
    400: "bad_request",
    404: "not_found",
    405: "method_not_allowed",
}


def _refusals(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Document error answers for OpenAPI."""
    meanings = {
        404: "There is no such thing.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        414: "The URL is too long.",
        422: "A parameter is missing, of the wrong type or out of its bounds.",
        429: "Too many searches at once: try again after the seconds in `Retry-After`.",
        503: "Something that the system needs, such as its model, is not there now.",
    }
    return {status: {"model": Problem, "description": meanings[status]} for status in statuses}


def create_app(
    index: Searchable,
    *,
    xray_html: str | Path | None = None,
    report_html: str | Path | None = None,
    max_query: int = 1000,
    max_k: int = 100,
    max_body: int = 64 * 1024,
    concurrency: int | None = None,
    queue: int = 32,
    patience: float = 5.0,
    refresh: float = 1.0,
    allowed_hosts: Sequence[str] | None = LOOPBACK_HOSTS,
) -> FastAPI:
    """Make the ASGI application over an index.

    Parameters
    ----------
    index
        A :class:`fullrank.retrieval.Index`, or anything else that is
        :class:`~fullrank.serve.Searchable`.
    xray_html, report_html
        Self-contained HTML files served at ``/xray`` and ``/report``, without scripts.
    max_query
        Longest query, in characters.
    max_k
        Most results of one search.
    max_body
        Largest body, in bytes.
    concurrency
        Searches at a time; by default one per CPU core, at most 4.
    queue
        Searches that wait for their turn; one more gets 429 with ``Retry-After``.
    patience
        Seconds a search waits for its turn before it gets 429.
    refresh
        Seconds between looks at whether another process has changed the index. Requests see the
        state before it or the one after it, never some of both.
    allowed_hosts
        Names accepted in the ``Host`` header, without port; None accepts any. The default is
        right for a server bound to this machine only.

    Returns
    -------
    fastapi.FastAPI
        Runs under any ASGI server; :func:`fullrank.serve.serve` runs it under uvicorn.

    Raises
    ------
    InputError
        On bounds that make no sense, a report that is not there, or an index without systems.

    Examples
    --------
    >>> from fullrank.core import Corpus, Run
    >>> class Tiny:
    ...     corpus = Corpus(["a"], ["a small text"])
    ...     systems, encoders, default_system = {"one": None}, {}, "one"
    ...     def search(self, query, k, *, system):
    ...         return Run({"q": (["a"], [1.0])})
    ...     def snippets(self, query, documents, *, system):
    ...         return [self.corpus[document].text for document in documents]
    >>> app = create_app(Tiny(), max_k=10)
    >>> app.openapi()["paths"]["/search"]["get"]["summary"]
    'Search'
    """
    chosen = {} if concurrency is None else {"concurrency": concurrency}
    limits = Limits(max_query, max_k, max_body, queue=queue, patience=patience, **chosen)
    reports = _reports({"/xray": xray_html, "/report": report_html})
    if not refresh >= 0:
        raise InputError(f"refresh is {refresh}; it is a number of seconds, at least 0")
    searcher = Searcher(index, limits.concurrency, refresh)
    example = searcher.now.default

    def workers() -> tuple[Gate, ThreadPoolExecutor]:
        return Gate(limits), ThreadPoolExecutor(limits.concurrency, thread_name_prefix="search")

    gate, pool = workers()  # not in the lifespan: mounted in another application, it has none

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        nonlocal gate, pool
        yield
        pool.shutdown(wait=False, cancel_futures=True)
        # It may be started again, in another event loop.
        gate, pool = workers()

    app = FastAPI(
        title="fullrank search",
        version=__version__,
        description=_DESCRIPTION,
        docs_url=None,  # the usual pages load scripts from elsewhere; /docs is our own
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.searcher, app.state.limits = searcher, limits

    async def run_search(request: Request, query: str, k: int, system: str | None) -> Response:
        async with gate() as waited:
            if waited and await request.is_disconnected():
                # Typed on meanwhile: nobody reads this answer, so it is not computed.
                return Response(status_code=204)
            work = asyncio.get_running_loop().run_in_executor(
                pool, lambda: searcher.search(query, k, system).model_dump_json()
            )
            # Shielded: a slot is free again when its thread is, not when its client has left.
            try:
                answer = await asyncio.shield(work)
            except asyncio.CancelledError:
                await asyncio.wait([work])
                raise
        return Response(answer, media_type="application/json")

    class SearchRequest(BaseModel):
        """A query, how many results, and which system."""

        model_config = ConfigDict(extra="forbid")
        query: str = Field(min_length=1, max_length=limits.max_query, examples=["sparse matrix"])
        k: int = Field(min(10, limits.max_k), ge=1, le=limits.max_k, examples=[10])
        system: str | None = Field(None, max_length=200, examples=[example])

    @app.get(
        "/search",
        response_model=SearchResponse,
        responses=_refusals(404, 414, 422, 429, 503),
        tags=["search"],
        summary="Search",
    )
    async def search(
        request: Request,
        q: Annotated[
            str,
            Query(
                description="The query.",
                min_length=1,
                max_length=limits.max_query,
                examples=["sparse matrix"],
            ),
        ],
        k: Annotated[int, Query(description="Results, at most.", ge=1, le=limits.max_k)] = min(
            10, limits.max_k
        ),
        system: Annotated[
            str | None,
            Query(
                description="One of `/systems`; the default system when absent.",
                max_length=200,
                examples=[example],
            ),
        ] = None,
    ) -> Response:
        """Answer a query with the best documents, the scores and the times of every stage."""
        return await run_search(request, q, k, system)

    @app.post(
        "/search",
        response_model=SearchResponse,
        responses=_refusals(404, 408, 413, 422, 429, 503),
        tags=["search"],
        summary="Search, with a JSON body",
    )
    async def search_body(request: Request, body: SearchRequest) -> Response:
        """Do the same for queries that do not fit into a URL or should not stand in logs."""
        return await run_search(request, body.query, body.k, body.system)

    @app.get("/systems", tags=["index"], summary="Systems")
    def systems() -> SystemsResponse:
        """List the systems to search with, and the bounds of a search."""
        now = searcher.now
        return SystemsResponse(
            default=now.default,
            systems=searcher.menu(now),
            documents=len(now.corpus),
            limits=Bounds(max_query=limits.max_query, max_k=limits.max_k),
            pages=list(reports),
        )

    @app.get("/document", responses=_refusals(404, 422), tags=["index"], summary="A whole document")
    def document(
        id: Annotated[str, Query(description="The document's id.", min_length=1, max_length=2000)],
    ) -> DocumentResponse:
        """Return one document's title and text."""
        corpus = searcher.now.corpus
        if id not in corpus:
            raise HTTPException(404, f"no document {printable(id)[:80]!r} in this index")
        found = corpus[id]
        return DocumentResponse(
            id=found.id,
            title=printable(found.title),
            text=printable(found.text[: limits.max_document]),
            truncated=len(found.text) > limits.max_document,
        )

    @app.get("/healthz", tags=["index"], summary="Health")
    def healthz() -> Health:
        """Say that the server answers, even when all its searches are taken."""
        return Health(status="ok", documents=len(searcher.now.corpus), version=__version__)

    app.include_router(page_routes(reports))
    _answer_errors(app)
    app.add_middleware(Guard, limits=limits, allowed_hosts=allowed_hosts)
    return app


def _reports(given: Mapping[str, str | Path | None]) -> dict[str, Path]:
    reports = {route: Path(file) for route, file in given.items() if file is not None}
    for route, file in reports.items():
        if not file.is_file():
            raise InputError(f"{file}, to be served at {route}, is not a file")
    return reports


def _allowed(request: Request) -> str:
    """Methods that a path answers, of all its routes (the framework tells those of the first)."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= set(getattr(route, "methods", None) or ())
    return ", ".join(sorted(methods))


def _answer_errors(app: FastAPI) -> None:
    """Turn every refusal into the same two fields."""

    def problem(
        status: int, error: str, detail: str, headers: Mapping[str, str] | None = None
    ) -> JSONResponse:
        return JSONResponse({"error": error, "detail": detail}, status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        details = []
        for found in error.errors():
            # The first part says where a value came from ("query", "body"), the rest its name: but
            # for a body that is no JSON it is a place in it.
            named = () if found["type"] == "json_invalid" else found["loc"][1:]
            name = ".".join(map(str, named)) or str(found["loc"][0])
            details.append(f"{name}: {found['msg']}")
        return problem(422, "invalid_request", printable("; ".join(details[:5]))[:1000])

    @app.exception_handler(StarletteHTTPException)
    async def http(request: Request, error: StarletteHTTPException) -> JSONResponse:
        status, detail, headers = error.status_code, str(error.detail), dict(error.headers or {})
        name = getattr(error, "error", None) or _NAMES.get(status, "refused")
        if detail == HTTPStatus(status).phrase:
            path = printable(request.url.path)[:80]
            detail = f"there is nothing at {path}"
            if status == HTTPStatus.METHOD_NOT_ALLOWED:
                headers["Allow"] = _allowed(request)
                detail = f"{path} answers {headers['Allow']} only"
        return problem(status, name, detail, headers)

    @app.exception_handler(InputError)
    async def unusable(_: Request, error: InputError) -> JSONResponse:
        return problem(422, "invalid_request", printable(str(error))[:1000])

    @app.exception_handler(UnknownSystemError)
    async def unknown(_: Request, error: UnknownSystemError) -> JSONResponse:
        return problem(404, "unknown_system", str(error))

    @app.exception_handler(StoreError)
    @app.exception_handler(MissingExtraError)
    async def unavailable(request: Request, error: FullrankError) -> JSONResponse:
        # Where things lie on this machine is for its log only.
        logger.error("%s %s: %s", request.method, request.url.path, error)
        return problem(503, "unavailable", printable(_FOLDERS.sub("", str(error)))[:1000])

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> JSONResponse:
        return problem(
            429, "too_busy", "too many searches at once; try again shortly", {"Retry-After": "1"}
        )
