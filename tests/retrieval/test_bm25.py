"""BM25: equal to bm25s, with results that are results, on disk and back."""

import json
import random

import bm25s
import numpy as np
import pytest
import Stemmer

from fullrank.core import Corpus, InputError, Run, StoreError
from fullrank.retrieval import BM25

TEXT = """
rank matrix value spectrum query document search index score model layer token vector tensor norm
trace basis kernel image scalar ranking ranked searching searched values documents indexes layers
"""
WORDS = TEXT.split()


@pytest.fixture(scope="module")
def corpus():
    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=draw.randrange(2, 12))) for _ in range(200)]
    texts[17] = ""
    return Corpus([f"d{i}" for i in range(200)], texts, [f"the {w}" for w in WORDS] + [""] * 172)


@pytest.fixture(scope="module")
def queries():
    draw = random.Random(1)
    return {f"q{i}": " ".join(draw.choices(WORDS, k=1 + i % 5)) for i in range(30)}


@pytest.mark.parametrize("method", ["lucene", "robertson", "atire", "bm25l", "bm25+"])
@pytest.mark.parametrize("stemmer", [None, "english"])
def test_equals_bm25s(corpus, queries, method, stemmer):
    how = {
        "stopwords": "en",
        "stemmer": None if stemmer is None else Stemmer.Stemmer(stemmer),
        "show_progress": False,
    }
    direct = bm25s.BM25(method=method, k1=0.9, b=0.4)
    direct.index(bm25s.tokenize(list(corpus.contents), **how), show_progress=False)
    rows, scores = direct.retrieve(
        bm25s.tokenize(list(queries.values()), **how), k=20, show_progress=False
    )
    run = BM25(corpus, method=method, k1=0.9, b=0.4, stemmer=stemmer).search(queries, 20)
    for i, query in enumerate(queries):
        # Among equal scores bm25s's choice is arbitrary, and it fills up with unmatched ones.
        found = run[query]
        np.testing.assert_array_equal(found.scores, scores[i][: len(found)].astype(np.float64))
        mine, theirs = run.to_dict()[query], dict(zip(rows[i].tolist(), scores[i], strict=True))
        # (Robertson's idf is 0 for tokens that half of the documents hold.)
        last = found.scores[-1] if len(found) else 0
        above = {f"d{row}" for row, score in theirs.items() if score > last}
        assert above <= mine.keys()


def test_only_documents_with_a_query_token_are_results():
    corpus = Corpus(["a", "b", "c"], ["rank matrix", "value", "value rank"])
    for method in ("lucene", "bm25l", "bm25+", "atire"):
        run = BM25(corpus, method=method)({"q": "matrix rank"})
        assert run["q"].ids.tolist() == ["a", "c"]
        assert (run["q"].scores > 0).all()


def test_ties_at_the_last_place_go_to_the_larger_id():
    corpus = Corpus([f"d{i}" for i in range(9)], ["rank"] * 9)
    assert BM25(corpus).search({"q": "rank"}, 3)["q"].ids.tolist() == ["d8", "d7", "d6"]


def test_an_accent_apart_is_the_letter_with_it():
    composed, apart = "caf\u00e9 cr\u00e8me", "cafe\u0301 cre\u0300me"
    engine = BM25(Corpus(["a", "b", "c"], [composed, apart, "cafe creme"]))
    for query in (composed, apart):
        assert sorted(engine.search({"q": query})["q"].ids) == ["a", "b"]


def test_titles_count():
    corpus = Corpus(["a", "b"], ["text", "text"], ["spectrum", ""])
    assert BM25(corpus)({"q": "spectrum"})["q"].ids.tolist() == ["a"]


def test_depth_and_k(corpus):
    index = BM25(corpus, depth=7)
    assert len(index({"q": "rank"})["q"]) == 7
    assert len(index.search({"q": "rank"}, 3)["q"]) == 3
    assert len(index.search({"q": "rank matrix value"}, 10_000)["q"]) <= 200


@pytest.mark.parametrize("query", ["", "   ", "the of and", "?!", "a", "zzzz", "\ud800"])
def test_queries_without_known_tokens_have_no_results(corpus, query):
    run = BM25(corpus)({"q": query, "p": "rank"})
    assert len(run["q"]) == 0
    assert len(run["p"]) > 0


def test_a_query_of_100_kb(corpus):
    run = BM25(corpus, depth=20)({"q": "rank matrix spectrum unknown " * 3500})
    assert len(run["q"]) == 20


def test_a_document_of_1_mb():
    corpus = Corpus(["big", "small"], ["spectrum value " * 70_000, "rank"])
    assert BM25(corpus)({"q": "value"})["q"].ids.tolist() == ["big"]


def test_one_document_and_no_tokens():
    assert BM25(Corpus(["a"], ["rank"]))({"q": "rank"})["q"].ids.tolist() == ["a"]
    nothing = BM25(Corpus(["a", "b"], ["", "?"]))
    assert len(nothing({"q": "rank"})["q"]) == 0


def test_behind_another_stage_it_scores_that_ones_items(corpus, queries):
    index = BM25(corpus)
    every = index.search(queries, 200)
    some = Run({q: (["d3", "d17", "d5"], [3.0, 2.0, 1.0]) for q in queries})
    run = index(queries, some)
    for query in queries:
        expected = every.to_dict()[query]
        assert run.to_dict()[query] == {i: expected.get(i, 0.0) for i in ("d3", "d17", "d5")}


def test_rescoring_what_is_not_there(corpus):
    index = BM25(corpus)
    with pytest.raises(InputError, match="'other'"):
        index({"q": "rank"}, Run({"q": (["other"], [1.0])}))
    with pytest.raises(InputError, match="text is not given"):
        index({"q": "rank"}, Run({"p": (["d1"], [1.0])}))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "bm42"}, {"k1": -1}, {"b": 2}, {"stopwords": "klingon"}, {"stemmer": "klingon"},
        {"depth": 0}, {"k1": float("nan")},
        {"k1": 0, "method": "bm25+"}, {"k1": 0.0, "method": "bm25l"},
    ],
)  # fmt: skip
def test_bad_settings(corpus, settings):
    with pytest.raises(InputError):
        BM25(corpus, **settings)


def test_own_stop_words():
    corpus = Corpus(["a", "b"], ["the rank", "rank of"])
    assert len(BM25(corpus, stopwords=["rank"])({"q": "rank"})["q"]) == 0
    assert BM25(corpus, stopwords=None)({"q": "the"})["q"].ids.tolist() == ["a"]


# -- on disk -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lucene", "bm25+"])
def test_round_trip(corpus, queries, tmp_path, method):
    index = BM25(corpus, method=method, stemmer="english", stopwords=["score"])
    folder = index.save(tmp_path / "deep" / "index")
    assert not [f for f in folder.rglob("*") if f.suffix in (".pkl", ".pickle")]
    for loaded in (BM25.load(folder), BM25.load(folder, corpus, depth=100)):
        assert loaded(queries) == index(queries)
    assert BM25.load(folder, corpus, depth=3).depth == 3
    assert BM25.load(folder).fingerprint == corpus.fingerprint


def test_an_index_without_tokens_round_trips(tmp_path):
    folder = BM25(Corpus(["a"], [""])).save(tmp_path / "index")
    assert len(BM25.load(folder)({"q": "rank"})["q"]) == 0


def test_saving_again_replaces(corpus, tmp_path):
    folder = BM25(corpus).save(tmp_path / "index")
    other = Corpus(["x"], ["rank"])
    BM25(other).save(folder)
    assert BM25.load(folder, other)({"q": "rank"})["q"].ids.tolist() == ["x"]
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_an_interrupted_save_leaves_the_old_index(corpus, tmp_path, monkeypatch):
    folder = BM25(corpus).save(tmp_path / "index")
    from fullrank.retrieval import bm25_files

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bm25_files, "atomic_write", full)
    with pytest.raises(OSError, match="space"):
        BM25(Corpus(["x"], ["rank"])).save(folder)
    assert BM25.load(folder, corpus).ids == corpus.ids
    assert [p.name for p in tmp_path.iterdir()] == ["index"]


def test_a_folder_of_something_else_is_left_alone(corpus, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        BM25(corpus).save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_another_corpus(corpus, tmp_path):
    folder = BM25(corpus).save(tmp_path / "index")
    with pytest.raises(StoreError, match="another corpus"):
        BM25.load(folder, Corpus(["a"], ["rank"]))


def test_damage(corpus, tmp_path):
    folder = BM25(corpus).save(tmp_path / "index")
    data = folder / "data.npy"
    data.write_bytes(data.read_bytes()[:-8])
    with pytest.raises(StoreError, match="damaged"):
        BM25.load(folder)
    data.unlink()
    with pytest.raises(StoreError, match="absent"):
        BM25.load(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"format": "new"}', '{"format": 1}', "{"])
def test_a_bad_manifest(corpus, tmp_path, text):
    folder = BM25(corpus).save(tmp_path / "index")
    (folder / "bm25.json").write_text(text)
    with pytest.raises(StoreError):
        BM25.load(folder)


def test_newer_and_absent(corpus, tmp_path):
    folder = BM25(corpus).save(tmp_path / "index")
    manifest = json.loads((folder / "bm25.json").read_text())
    (folder / "bm25.json").write_text(json.dumps(manifest | {"format": 99}))
    with pytest.raises(StoreError, match="newer"):
        BM25.load(folder)
    with pytest.raises(StoreError, match="no BM25 index"):
        BM25.load(tmp_path / "nothing")


def test_objects_are_not_unpickled(corpus, tmp_path):
    from fullrank.core import atomic_write
    from fullrank.core.files import sha256_file

    folder = BM25(corpus).save(tmp_path / "index")
    np.save(folder / "data.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    manifest = json.loads((folder / "bm25.json").read_text())
    manifest["files"]["data.npy"] = sha256_file(folder / "data.npy")
    atomic_write(folder / "bm25.json", json.dumps(manifest).encode())
    with pytest.raises(StoreError, match="allow_pickle"):
        BM25.load(folder)
