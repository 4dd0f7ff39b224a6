"""The JSON API: what it answers, what it refuses and how."""

import json

import pytest
from fastapi.testclient import TestClient

from fullrank.core import InputError
from fullrank.serve import create_app

BASE = "http://127.0.0.1:8000"


@pytest.fixture
def client(index):
    with TestClient(create_app(index, max_query=200, max_k=20, max_body=4096), BASE) as client:
        yield client


def refused(response, status, error):
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error", "detail"}
    assert body["error"] == error
    assert body["detail"]
    return body["detail"]


def test_search_tells_every_stage_s_score_and_time(client):
    answer = client.get("/search", params={"q": "sparse matrix", "k": 2}).json()
    assert (answer["system"], answer["k"], answer["query"]) == ("both", 2, "sparse matrix")
    assert [stage["stage"] for stage in answer["stages"]] == ["bm25", "dense", "both", "snippets"]
    assert answer["stages"][0]["milliseconds"] == 0.25
    assert answer["milliseconds"] > 0
    first, second = answer["results"]
    assert first["id"] == first["title"] == "scipy.sparse.linalg.svds"
    assert first["rank"] == 1
    assert first["scores"] == pytest.approx({"bm25": 6.0, "dense": 0.3, "both": 6.3})
    assert first["score"] == pytest.approx(6.3)
    assert second["score"] < first["score"]


def test_highlights_count_code_points(client):
    answer = client.get("/search", params={"q": "pairwise matrix observations"}).json()
    snippet = answer["results"][0]["snippet"]
    assert "𝒳" in snippet["text"]
    words = [snippet["text"][start:end] for start, end in snippet["highlights"]]
    assert words == ["Pairwise", "observations", "matrix"]


def test_long_snippets_are_cut_with_their_highlights(client):
    (result,) = client.get("/search", params={"q": "word"}).json()["results"]
    snippet = result["snippet"]
    assert len(snippet["text"]) == 601
    assert snippet["text"].endswith("…")
    assert snippet["highlights"][-1] == [595, 599]


def test_a_single_system_has_a_single_score(client):
    answer = client.get("/search", params={"q": "matrix", "system": "bm25"}).json()
    assert answer["system"] == "bm25"
    assert set(answer["results"][0]["scores"]) == {"bm25"}


def test_post_is_the_same_search(client):
    body = {"query": "sparse matrix", "k": 3, "system": "dense"}
    posted = client.post("/search", json=body).json()
    got = client.get("/search", params={"q": "sparse matrix", "k": 3, "system": "dense"}).json()
    assert posted["results"] == got["results"]


def test_nothing_found_is_an_answer(client):
    answer = client.get("/search", params={"q": "zzz"})
    assert answer.status_code == 200
    assert answer.json()["results"] == []


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"q": ""},
        {"q": "   \t\n"},
        {"q": "x" * 201},
        {"q": "x", "k": 0},
        {"q": "x", "k": 21},
        {"q": "x", "k": "many"},
        {"q": "x", "k": "1" * 5000},
        {"q": "x", "k": "1e9"},
        {"q": "x", "system": "s" * 201},
    ],
)
def test_values_out_of_bounds(client, params):
    detail = refused(client.get("/search", params=params), 422, "invalid_request")
    assert len(detail) < 300, "a refusal does not repeat what was sent"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"query": 5}',
        b'{"query": ""}',
        b'{"query": "a", "k": true, "unknown": 1}',
        b'{"query": "a", "k": 1e400}',
        b'{"query": "a", "k": -1}',
        b'{"q": "a"}',
        b'{"query": "\\ud800"}',
        json.dumps({"query": "x" * 300}).encode(),
    ],
)
def test_bodies_that_are_no_search(client, body):
    response = client.post("/search", content=body, headers={"content-type": "application/json"})
    refused(response, 422, "invalid_request")


@pytest.mark.parametrize(
    "body", [b"[" * 4000, b"\xff\xfe{}", b'{"query": "a", "k": %s}' % (b"9" * 4000)]
)
def test_bodies_that_are_no_json(client, body):
    response = client.post("/search", content=body, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422)
    assert set(response.json()) == {"error", "detail"}


def test_a_body_that_is_no_json_is_called_the_body(client):
    response = client.post("/search", content=b"{'", headers={"content-type": "application/json"})
    assert refused(response, 422, "invalid_request").startswith("body: ")


def test_a_form_is_not_taken_for_json(client):
    response = client.post(
        "/search", content=b'{"query": "matrix"}', headers={"content-type": "text/plain"}
    )
    refused(response, 422, "invalid_request")


def test_body_too_large_declared_and_streamed(client):
    large = b" " * 5000
    refused(client.post("/search", content=large), 413, "body_too_large")

    def chunks():
        for _ in range(5):
            yield b" " * 1000

    response = client.post("/search", content=chunks())
    refused(response, 413, "body_too_large")
    assert response.headers["connection"] == "close"


def test_url_too_long(client):
    refused(client.get("/search", params={"q": "x" * 50_000}), 414, "url_too_long")


def test_unknown_things(client):
    detail = refused(
        client.get("/search", params={"q": "a", "system": "no"}), 404, "unknown_system"
    )
    assert "both, bm25, dense" in detail
    refused(client.get("/nothing"), 404, "not_found")
    refused(client.get("/document", params={"id": "no"}), 404, "not_found")
    for path in ("/static/app.py", "/static/../app.py", "/static/%2e%2e/app.py", "/report"):
        refused(client.get(path), 404, "not_found")


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods(client, method):
    response = client.request(method, "/systems")
    refused(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "GET"
    response = client.request(method, "/search")
    assert refused(response, 405, "method_not_allowed") == "/search answers GET, POST only"
    assert response.headers["allow"] == "GET, POST"


def test_head_is_get_without_a_body(client):
    for path in ("/", "/healthz", "/search?q=matrix", "/static/style.css"):
        response = client.head(path)
        assert response.status_code == 200
        assert response.content == b""
        assert int(response.headers["content-length"]) > 0


def test_queries_of_any_characters(client):
    for query in ("\0", "𝒳𝒳", "'; DROP TABLE", "<b>", "\u202e", "a" * 200, "%", "?&=#"):
        answer = client.get("/search", params={"q": query})
        assert answer.status_code == 200
        assert answer.json()["query"] == query.strip()
    assert client.get("/search?q=%ff%fe").status_code == 200


def test_documents_that_utf8_cannot_carry(client):
    (result,) = client.get("/search", params={"q": "broken"}).json()["results"]
    assert result["title"] == "Broken ? title"
    assert client.get("/document", params={"id": "surrogate"}).json()["text"] == "broken ? text"


def test_long_documents_are_cut(client):
    found = client.get("/document", params={"id": "long"}).json()
    assert len(found["text"]) == 100_000
    assert found["truncated"]
    small = client.get("/document", params={"id": "untitled"}).json()
    assert small == {
        "id": "untitled", "title": "", "text": "a matrix without title", "truncated": False
    }  # fmt: skip


def test_systems_health_and_limits(client):
    answer = client.get("/systems").json()
    assert answer["default"] == "both"
    assert [system["name"] for system in answer["systems"]] == ["both", "bm25", "dense"]
    assert answer["systems"][1] == {
        "name": "bm25", "kind": "bm25", "encoder": None, "description": "words in common (BM25)"
    }  # fmt: skip
    assert answer["limits"] == {"max_query": 200, "max_k": 20}
    assert answer["pages"] == []
    health = client.get("/healthz").json()
    assert (health["status"], health["documents"]) == ("ok", 38)


def test_openapi_describes_what_is_answered(client):
    api = client.get("/openapi.json").json()
    assert set(api["paths"]) == {"/search", "/systems", "/document", "/healthz"}
    operation = api["paths"]["/search"]["get"]
    assert set(operation["responses"]) == {"200", "404", "414", "422", "429", "503"}
    (query,) = (p for p in operation["parameters"] if p["name"] == "q")
    assert query["schema"]["maxLength"] == 200
    body = api["components"]["schemas"]["SearchRequest"]
    assert body["properties"]["k"]["maximum"] == 20
    schemas = api["components"]["schemas"]
    assert "HTTPValidationError" not in schemas, "errors have one shape"
    assert all(schema.get("description") for schema in schemas.values())


def test_failures_inside_are_json_and_logged(index, caplog):
    def broken(queries):
        raise RuntimeError("secret detail")

    index.systems["bm25"] = broken
    with TestClient(create_app(index), BASE) as client:
        response = client.get("/search", params={"q": "a", "system": "bm25"})
    assert "secret" not in refused(response, 500, "internal")
    assert "script-src 'self'" in response.headers["content-security-policy"]
    assert "secret detail" in caplog.text


def test_input_errors_of_a_stage_are_refusals(index):
    def picky(queries):
        raise InputError("this query cannot be parsed")

    index.systems["bm25"] = picky
    with TestClient(create_app(index), BASE) as client:
        response = client.get("/search", params={"q": "a", "system": "bm25"})
    assert refused(response, 422, "invalid_request") == "this query cannot be parsed"


@pytest.mark.parametrize(
    "bad", [{"max_k": 0}, {"max_query": 0}, {"max_body": 0}, {"concurrency": 0}, {"queue": -1},
            {"patience": 0}, {"xray_html": "/nonexistent.html"}],
)  # fmt: skip
def test_bounds_that_make_no_sense(index, bad):
    with pytest.raises(InputError):
        create_app(index, **bad)


def test_an_index_that_cannot_be_searched(index):
    index.default_system = "gone"
    with pytest.raises(InputError, match="gone"):
        create_app(index)
    index.systems = {}
    with pytest.raises(InputError, match="no system"):
        create_app(index)
