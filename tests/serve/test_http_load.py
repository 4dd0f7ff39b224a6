"""A real server on a real socket: many clients, rude clients, Ctrl-C."""

import asyncio
import signal
import socket
import time
from collections import Counter
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from fullrank.core import InputError, StoreError
from fullrank.serve import serve
from fullrank.serve.server import listen


async def crowd(url, clients, seconds):
    statuses, missing = Counter(), []
    until = time.monotonic() + seconds

    async def one(client, seed):
        while time.monotonic() < until:
            answer = await client.get("/search", params={"q": f"matrix {seed}", "k": 10})
            statuses[answer.status_code] += 1
            if answer.status_code == 429:
                missing.append("retry-after" not in answer.headers)
                await asyncio.sleep(0.1)

    limits = httpx.Limits(max_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        await asyncio.gather(*(one(client, seed) for seed in range(clients)))
    return statuses, missing


def test_a_crowd_gets_answers_or_429_and_memory_stays(server):
    with server("0.01") as (process, url):
        asyncio.run(crowd(url, 20, 1))
        memory = psutil.Process(process.pid).memory_info
        before = memory().rss
        statuses, missing = asyncio.run(crowd(url, 50, 3))
        grown = (memory().rss - before) / 2**20
        assert httpx.get(f"{url}/healthz", timeout=60).json()["status"] == "ok"
    assert set(statuses) == {200, 429}
    assert not any(missing)
    assert grown < 25, f"resident memory grew by {grown:.1f} MiB"
    assert process.returncode == 0


def test_ctrl_c_lets_a_request_finish_and_frees_the_port(server):
    with server("0.5") as (process, url):

        async def interrupted():
            async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                asking = asyncio.create_task(client.get("/search", params={"q": "matrix"}))
                await asyncio.sleep(0.2)
                process.send_signal(signal.SIGINT)
                return await asking

        assert asyncio.run(interrupted()).status_code == 200
        assert process.wait(60) == 0
    address = urlsplit(url)
    listen(address.hostname, address.port).close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",  # TLS to a plain port
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /search?q=a HTTP/1.1\r\n\r\n",  # no Host
        b"GET http://evil.example/search?q=a HTTP/1.1\r\nHost: evil.example\r\n\r\n",
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n",
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999\r\n\r\n",
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /search?q=" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /" + b"\xff" * 100 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 200_000,
    ],
    ids=lambda value: value[:24].decode("latin-1").encode("unicode_escape").decode(),
)
def test_rude_requests_get_4xx_and_the_server_goes_on(shared_server, request_bytes):
    address = urlsplit(shared_server)
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        try:
            connection.sendall(request_bytes)
            answer = connection.recv(65536)
        except ConnectionError:
            answer = b""
    assert answer == b"" or answer.startswith(b"HTTP/1.1 4"), answer[:200]
    assert httpx.get(f"{shared_server}/healthz", timeout=60).status_code == 200


def test_many_idle_connections_do_not_stop_others(shared_server):
    address = urlsplit(shared_server)
    idle = [
        socket.create_connection((address.hostname, address.port), timeout=60) for _ in range(200)
    ]
    try:
        for connection in idle[:100]:
            connection.sendall(b"GET /search?q=a HTTP/1.1\r\nHost: loc")
        assert (
            httpx.get(f"{shared_server}/search", params={"q": "matrix"}, timeout=60).status_code
            == 200
        )
    finally:
        for connection in idle:
            connection.close()


@pytest.fixture(scope="module")
def shared_server():
    from conftest import running_server

    with running_server() as (_, url):
        yield url


def test_folders_that_hold_no_index(tmp_path):
    with pytest.raises(StoreError, match="not a folder"):
        serve(tmp_path / "absent", port=0)
    with pytest.raises(StoreError):
        serve(tmp_path, port=0)


def test_an_address_that_is_taken_or_not_ours(tmp_path):
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}.*--port"):
            serve(tmp_path, port=port)
    with pytest.raises(InputError, match="cannot serve"):
        serve(tmp_path, host="192.0.2.1", port=0)
