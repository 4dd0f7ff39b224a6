"""Over its bound the server says so at once, and goes on."""

import asyncio
import threading
from collections import Counter

import httpx
import pytest

from fullrank.serve import create_app
from fullrank.serve.limits import BusyError, Gate, Limits

BASE = "http://127.0.0.1:8000"


def held(index):
    """Make a system wait for an event; returns the event and what runs at the same time."""
    release, running, lock = threading.Event(), Counter(), threading.Lock()
    inner = index.systems["both"]
    index.systems["both"] = lambda queries: inner(queries)
    inner({"q": "warm"})

    def slow(queries):
        with lock:
            running["now"] += 1
            running["most"] = max(running["most"], running["now"])
        release.wait(10)
        with lock:
            running["now"] -= 1
        return inner(queries)

    index.systems["both"] = slow
    return release, running


async def ask(app, count):
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
        return await asyncio.gather(
            *(client.get("/search", params={"q": "matrix"}) for _ in range(count))
        )


def test_over_the_bound_is_429_with_retry_after(index):
    release, running = held(index)
    app = create_app(index, concurrency=2, queue=3, patience=30)

    async def main():
        asking = asyncio.create_task(ask(app, 20))
        await asyncio.sleep(0.2)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            assert (await client.get("/healthz")).status_code == 200, "still answers otherwise"
        release.set()
        return await asking

    answers = asyncio.run(main())
    assert Counter(a.status_code for a in answers) == {200: 5, 429: 15}
    for answer in answers:
        if answer.status_code == 429:
            assert answer.headers["retry-after"] == "1"
            assert answer.json()["error"] == "too_busy"
    assert running["most"] <= 2


def test_waiting_too_long_is_429(index):
    release, _ = held(index)
    app = create_app(index, concurrency=1, queue=3, patience=0.1)

    async def main():
        asking = asyncio.create_task(ask(app, 3))
        await asyncio.sleep(0.4)
        release.set()
        return await asking

    assert Counter(a.status_code for a in asyncio.run(main())) == {200: 1, 429: 2}


def test_the_bound_is_free_again_after_refusals_and_failures(index):
    calls = Counter()
    inner = index.systems["both"]

    def moody(queries):
        calls["n"] += 1
        if calls["n"] % 2:
            raise RuntimeError("no")
        return inner(queries)

    index.systems["both"] = moody
    app = create_app(index, concurrency=1, queue=0)

    async def main():
        return [(await ask(app, 1))[0].status_code for _ in range(6)]

    assert asyncio.run(main()) == [500, 200] * 3


def test_an_application_is_started_again_in_another_event_loop(index):
    app = create_app(index, concurrency=1)

    async def main():
        async with app.router.lifespan_context(app):
            return [answer.status_code for answer in await ask(app, 3)]

    assert asyncio.run(main()) == asyncio.run(main()) == [200] * 3


def test_gate_counts_right_when_those_who_wait_leave():
    async def main():
        gate = Gate(Limits(concurrency=1, queue=1, patience=5))
        entered = asyncio.Event()

        async def hold():
            async with gate():
                entered.set()
                await asyncio.sleep(60)

        holder = asyncio.create_task(hold())
        await entered.wait()
        waiter = asyncio.create_task(hold())
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            async with gate():
                pass
        waiter.cancel()
        holder.cancel()
        await asyncio.gather(waiter, holder, return_exceptions=True)
        for _ in range(3):
            async with gate() as waited:
                assert not waited

    asyncio.run(main())


def test_a_body_that_never_comes(index):
    app = create_app(index, patience=0.1)
    sent = []

    async def main():
        async def receive():
            await asyncio.sleep(60)

        async def send(message):
            sent.append(message)

        scope = {
            "type": "http", "method": "POST", "path": "/search", "raw_path": b"/search",
            "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
        }  # fmt: skip
        await app(scope, receive, send)

    asyncio.run(main())
    assert sent[0]["status"] == 408
    assert b"body_too_slow" in sent[1]["body"]
