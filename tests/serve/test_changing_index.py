"""A server over an index that other processes change, and that may lose its models."""

import gc
import shutil
import subprocess
import sys
import threading
import weakref

import pytest
from fastapi.testclient import TestClient

from fullrank.core import Corpus, Document
from fullrank.retrieval import Index
from fullrank.serve import create_app

BASE = "http://127.0.0.1:8000"
WORDS = ["alpha", "beta", "gamma", "delta", "matrix", "vector", "rank", "norm", "bread", "oven"]
CHANGE = """
import sys
from fullrank.core import Document
from fullrank.retrieval import Index
index = Index.open(sys.argv[1])
index.add([Document("new", "a matrix that came later", "Later")], progress=False)
index.delete(["bread"])
"""


@pytest.fixture
def folder(tmp_path):
    corpus = Corpus(["svd", "bread"], ["singular values of a matrix", "bread from the oven"])
    return Index.create(tmp_path / "index", corpus, None, progress=False).folder


def client(index, **options):
    return TestClient(create_app(index, **{"refresh": 0, **options}), BASE)


def found(http, query, **params):
    response = http.get("/search", params={"q": query, **params})
    assert response.status_code == 200, response.text
    return [result["id"] for result in response.json()["results"]]


def test_changes_by_another_process_are_seen_and_the_old_state_goes(folder):
    index = Index.open(folder)
    with client(index) as http:
        assert found(http, "matrix") == ["svd"]
        assert found(http, "bread") == ["bread"]
        old = weakref.ref(index.corpus)
        subprocess.run([sys.executable, "-c", CHANGE, folder], check=True, timeout=120)
        gc.collect()
        gc.disable()
        try:
            assert sorted(found(http, "matrix")) == ["new", "svd"]
            assert old() is None, "nothing holds the documents that were served before"
        finally:
            gc.enable()
        assert found(http, "bread") == []
        assert http.get("/document", params={"id": "new"}).json()["title"] == "Later"
        assert http.get("/document", params={"id": "bread"}).status_code == 404
        assert http.get("/systems").json()["documents"] == 2
        assert http.get("/healthz").json()["documents"] == 2


def test_looks_are_as_far_apart_as_asked_for(folder):
    with client(Index.open(folder), refresh=3600) as http:
        Index.open(folder).delete(["bread"])
        assert found(http, "bread") == ["bread"]
        assert http.get("/healthz").json()["documents"] == 2


def test_an_answer_in_the_making_sees_one_state(folder, monkeypatch):
    index = Index.open(folder)
    search, inside = Index.search, []

    def changing(self, query, *arguments, **options):
        run = search(self, query, *arguments, **options)
        if query == "bread oven" and not inside:
            inside.append(1)
            Index.open(folder).delete(["bread"])
            inside.append(found(http, "bread"))  # another request takes the new state up
        return run

    monkeypatch.setattr(Index, "search", changing)
    with client(index, concurrency=2) as http:
        (result,) = http.get("/search", params={"q": "bread oven"}).json()["results"]
        assert inside == [1, []]
        assert result["id"] == "bread"
        assert result["snippet"]["text"] == "bread from the oven"
        assert found(http, "bread oven") == []


def test_requests_go_on_while_the_index_changes(folder):
    writer, done, failures, seen = Index.open(folder), threading.Event(), [], set()
    with client(Index.open(folder), concurrency=4) as http:

        def ask():
            try:
                while not done.is_set():
                    seen.update(found(http, "matrix bread"))
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=ask) for _ in range(4)]
        for thread in threads:
            thread.start()
        for round_ in range(6):
            writer.add([Document(f"m{round_}", "matrix")], progress=False)
            writer.delete(["bread" if round_ == 0 else f"m{round_ - 1}"])
        done.set()
        for thread in threads:
            thread.join()
        assert failures == []
        assert "svd" in seen
        assert sorted(found(http, "matrix bread")) == ["m5", "svd"]


def test_a_state_that_cannot_be_read_is_not_taken(folder, caplog):
    with client(Index.open(folder)) as http:
        manifest = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_bytes(manifest[:-20])
        for _ in range(3):
            assert found(http, "matrix") == ["svd"]
        said = [r.message for r in caplog.records if r.name == "fullrank.serve"]
        assert len(said) == 1
        assert "goes on with the index as it was" in said[0]
        assert "no valid JSON" in said[0]
        (folder / "manifest.json").write_bytes(manifest)
        Index.open(folder).add([Document("new", "matrix")], progress=False)
        assert sorted(found(http, "matrix")) == ["new", "svd"]


def test_a_model_that_vanishes_is_a_503_and_other_systems_go_on(tiny_encoder, tmp_path, caplog):
    models = {
        name: shutil.copytree(tiny_encoder(*WORDS), tmp_path / "secret place" / name)
        for name in ("base", "tuned")
    }
    corpus = Corpus(["a", "b"], ["alpha matrix", "bread oven"])
    Index.create(tmp_path / "index", corpus, models, progress=False)
    with client(Index.open(tmp_path / "index")) as http:
        assert found(http, "matrix", system="dense:base")[0] == "a"
        away = models["tuned"].rename(tmp_path / "away")
        for kind in ("dense", "rrf", "weighted", "feedback"):
            response = http.get("/search", params={"q": "matrix", "system": f"{kind}:tuned"})
            assert response.status_code == 503
            body = response.json()
            assert body["error"] == "unavailable"
            assert "the model of encoder 'tuned' is not at" in body["detail"]
            assert "secret" not in body["detail"], "what lies where is nobody else's business"
        assert str(models["tuned"]) in caplog.text
        assert found(http, "matrix", system="bm25") == ["a"]
        assert found(http, "matrix", system="rrf:base")[0] == "a"
        away.rename(models["tuned"])
        assert found(http, "matrix", system="rrf:tuned")[0] == "a"
