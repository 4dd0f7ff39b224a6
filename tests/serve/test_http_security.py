"""Who may ask, and what every answer carries."""

import re
from importlib import resources

import pytest
from fastapi.testclient import TestClient

from fullrank.serve import create_app
from fullrank.serve.server import is_loopback

BASE = "http://127.0.0.1:8000"
STATIC = resources.files("fullrank.serve") / "static"


@pytest.fixture
def client(index, tmp_path):
    xray = tmp_path / "xray.html"
    xray.write_text("<!doctype html><title>X-ray</title><script>alert(1)</script>")
    with TestClient(create_app(index, xray_html=xray), BASE) as client:
        yield client


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/search?q=matrix", "/search", "/nothing", "/xray", "/openapi.json",
             "/static/search.js", "/favicon.ico", "/healthz", "/search?q=" + "x" * 20_000],
)  # fmt: skip
def test_headers_on_every_answer(client, path):
    headers = client.get(path, headers={"origin": "http://evil.example"}).headers
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "frame-ancestors 'none'" in policy
    if path == "/xray":
        assert "script-src" not in policy
    else:
        assert "unsafe" not in policy
        assert "script-src 'self'; style-src 'self'; connect-src 'self'" in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert not [name for name in headers if name.startswith("access-control")]


def test_no_preflight_is_granted(client):
    response = client.options(
        "/search",
        headers={"origin": "http://evil.example", "access-control-request-method": "POST"},
    )
    assert response.status_code == 405
    assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("LOCALHOST:1", 200),
        ("[::1]:8000", 200),
        ("[::1]", 200),
        ("evil.example", 400),
        ("evil.example:8000", 400),
        ("127.0.0.1.evil.example", 400),
        ("localhost:80@evil.example", 400),
        ("", 400),
    ],
)
def test_only_names_of_this_machine(client, host, status):
    response = client.get("/healthz", headers={"host": host})
    assert response.status_code == status
    if status == 400:
        assert response.json()["error"] == "unknown_host"


def test_any_name_where_that_is_wanted(index):
    with TestClient(create_app(index, allowed_hosts=None), "http://search.example") as client:
        assert client.get("/healthz").status_code == 200


def test_loopback_addresses():
    assert all(map(is_loopback, ["127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "192.168.1.2", "example.org", ""]))


def test_websockets_are_closed(client):
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/search"):
        pass


def test_pages_hold_nothing_inline_and_nothing_from_elsewhere():
    for name in ("index.html", "docs.html"):
        page = (STATIC / name).read_text()
        assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)
        for source in re.findall(r'(?:src|href|action)="([^"]*)"', page):
            assert source.startswith("/"), source
            assert not source.startswith("//"), source
        assert not re.search(r"<script(?![^>]*\ssrc=)", page)
    for name in ("style.css", "search.js", "results.js", "systems.js", "docs.js", "dom.js"):
        text = (STATIC / name).read_text()
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text), name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(", text)


def test_copies_of_static_files_are_checked(client):
    first = client.get("/static/search.js")
    again = client.get("/static/search.js", headers={"if-none-match": first.headers["etag"]})
    assert (first.status_code, again.status_code, again.content) == (200, 304, b"")
    assert client.get("/favicon.ico").headers["content-type"] == "image/svg+xml"


def test_a_report_that_has_gone(index, tmp_path):
    xray = tmp_path / "xray.html"
    xray.write_text("x")
    with TestClient(create_app(index, xray_html=xray), BASE) as client:
        assert client.get("/systems").json()["pages"] == ["/xray"]
        assert client.get("/xray").text == client.get("/xray.html").text == "x"
        xray.unlink()
        response = client.get("/xray")
    assert response.status_code == 404
    assert response.json()["error"] == "not_found"
