"""The server over a real index: what a user of `fullrank serve` gets."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections import Counter

import httpx
import pytest
from fastapi.testclient import TestClient

from fullrank.core import Corpus
from fullrank.retrieval import Index
from fullrank.serve import create_app

BASE = "http://127.0.0.1:8000"
TEXTS = {
    "svd": "Singular value decomposition of a matrix into orthogonal factors.",
    "bread": "Knead the dough, let it rise, and bake bread in a hot oven.",
    "graph": "The shortest path between two nodes of a graph.",
    "rank": "The rank of a matrix is the number of its nonzero singular values.",
    "cat": "A cat sleeps most of the day and hunts at night.",
}


def corpus():
    return Corpus(list(TEXTS), list(TEXTS.values()), [name.title() for name in TEXTS])


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("index")
    return Index.create(folder, corpus(), progress=False)


@pytest.fixture(scope="module")
def client(index):
    with TestClient(create_app(index), BASE) as client:
        yield client


def test_fused_systems_show_the_scores_of_their_parts(client):
    answer = client.get("/search", params={"q": "singular values", "system": "rrf"}).json()
    first = answer["results"][0]
    assert first["id"] in ("svd", "rank")
    assert list(first["scores"]) == ["bm25", "dense", "rrf"]
    assert first["scores"]["rrf"] == first["score"]
    assert [stage["stage"] for stage in answer["stages"]] == ["bm25", "dense", "rrf", "snippets"]
    last = answer["results"][-1]
    assert last["scores"]["bm25"] is None, "shares no word with the query"
    assert last["scores"]["dense"] is not None
    text = first["snippet"]["text"]
    assert "singular" in {text[a:b].lower() for a, b in first["snippet"]["highlights"]}


def test_stage_scores_are_those_of_the_systems_alone(client):
    fused = client.get("/search", params={"q": "matrix factors", "system": "rrf"}).json()
    for system in ("bm25", "dense"):
        alone = client.get("/search", params={"q": "matrix factors", "system": system}).json()
        expected = {r["id"]: r["score"] for r in alone["results"]}
        scores = {r["id"]: r["scores"][system] for r in fused["results"]}
        found = {document: score for document, score in scores.items() if score is not None}
        assert found == pytest.approx(expected, rel=1e-6)


def test_a_reranked_system_shows_every_stage(client):
    answer = client.get("/search", params={"q": "path in a graph", "system": "feedback"}).json()
    first = answer["results"][0]
    assert first["id"] == "graph"
    stages = list(first["scores"])
    assert stages == ["bm25", "dense", "rrf", "feedback"], "each stage reports what it gave"
    assert first["scores"]["feedback"] == first["score"]


@pytest.mark.parametrize("query", ["the of", "?!", "\0", "\u200b", "𝒳" * 900, "a" * 1000])
def test_odd_queries_in_every_system(client, query):
    for system in client.get("/systems").json()["systems"]:
        response = client.get("/search", params={"q": query, "system": system["name"]})
        assert response.status_code == 200, (system["name"], response.text)


def test_threads_get_the_answers_that_one_alone_gets(index):
    app = create_app(Index.open(index.folder), concurrency=4, queue=200, patience=60)
    queries = [*TEXTS.values(), "matrix", "night oven", "values of a graph"]

    async def ask(count):
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url=BASE) as client:
            asked = [queries[i % len(queries)] for i in range(count)]
            answers = await asyncio.gather(
                *(client.get("/search", params={"q": q, "system": "rrf"}) for q in asked)
            )
        return list(zip(asked, answers, strict=True))

    answers = asyncio.run(ask(80))
    assert Counter(a.status_code for _, a in answers) == {200: 80}
    seen: dict[str, set[str]] = {}
    for query, answer in answers:
        shown = [(r["id"], r["scores"]) for r in answer.json()["results"]]
        seen.setdefault(query, set()).add(json.dumps(shown))
    assert {len(different) for different in seen.values()} == {1}


def test_serve_a_demo_folder_until_it_is_told_to_stop(tmp_path):
    Index.create(tmp_path / "index", corpus(), encoders=None, progress=False)
    (tmp_path / "xray.html").write_text("<!doctype html><title>X-ray</title>")
    program = "import sys, fullrank.serve; fullrank.serve.serve(sys.argv[1], port=0)"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
        with httpx.Client(base_url=found[0], timeout=60) as http:
            assert http.get("/systems").json()["pages"] == ["/xray"]
            assert http.get("/search", params={"q": "bread"}).json()["results"][0]["id"] == "bread"
            assert "X-ray" in http.get("/xray").text
            refused = http.get("/healthz", headers={"host": "search.example"})
            assert refused.status_code == 400
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        assert process.stdout.read() == ""
    finally:
        timer.cancel()
        process.kill()
        process.wait()
        process.stdout.close()
