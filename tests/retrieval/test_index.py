"""`Index`: what is created is found, by every system, and changes encode only what is new."""

import shutil
import threading

import numpy as np
import pytest
from index_tools import WORDS, make_corpus, make_documents
from sentence_transformers import SentenceTransformer
from tiny_models import save_encoder

from fullrank.core import Corpus, Document, InputError, StoreError
from fullrank.retrieval import BM25, Dense, Encoder, Index, rrf, weighted
from fullrank.retrieval.index_store import generation_folder

QUERIES = {"q1": "matrix rank", "q2": "alpha omega spectrum", "q3": "the norm of a vector"}
KINDS = ["bm25", "dense", "rrf", "weighted", "feedback"]


@pytest.fixture(scope="module")
def model(tiny_encoder):
    return tiny_encoder(*WORDS)


@pytest.fixture(scope="module")
def corpus():
    return make_corpus(60)


@pytest.fixture(scope="module")
def whole(model, corpus, tmp_path_factory):
    """An index that tests only read."""
    folder = tmp_path_factory.mktemp("read") / "an index"
    return Index.create(folder, corpus, {"tiny": model}, progress=False)


@pytest.fixture
def copied(whole, tmp_path):
    """An index of one's own."""
    return Index.open(shutil.copytree(whole.folder, tmp_path / "index"))


@pytest.fixture
def encoded(monkeypatch):
    """Every document text that is encoded from here on."""
    texts = []
    original = Encoder.encode

    def encode(self, given, *, kind="document", progress=False):
        if kind == "document":
            texts.extend(given)
        return original(self, given, kind=kind, progress=progress)

    monkeypatch.setattr(Encoder, "encode", encode)
    return texts


def generations(index):
    return sorted(int(path.name) for path in (index.folder / "generations").iterdir())


def same_results(a, b):
    for system in a.systems:
        assert a.search(QUERIES, 100, system=system) == b.search(QUERIES, 100, system=system)


# -- searching -----------------------------------------------------------------------------


def test_systems_are_the_stages_they_are_named_after(whole, corpus, model):
    assert list(whole.systems) == KINDS
    assert whole.default_system == "rrf"
    bm25, dense = BM25(corpus), Dense(corpus, Encoder(model))
    expected = {
        "bm25": bm25,
        "dense": dense,
        "rrf": rrf(bm25, dense),
        "weighted": weighted(bm25, dense),
    }
    for name, stage in expected.items():
        found = whole.search(QUERIES, 20, system=name)
        assert found.name == name
        for query in QUERIES:
            wanted = stage(QUERIES)[query]
            assert found[query].ids.tolist() == wanted.ids[:20].tolist()
            np.testing.assert_allclose(found[query].scores, wanted.scores[:20], atol=1e-5)
    feedback = whole.search(QUERIES, system="feedback")
    assert [stage.stage for stage in feedback.trace] == [
        "bm25",
        "dense",
        "rrf",
        "% 100",
        "feedback",
    ]


def test_systems_compose_with_other_stages(whole, corpus):
    run = (whole.systems["bm25"] % 5 >> whole.systems["dense"])(QUERIES)
    assert set(run["q1"].ids) == set(whole.search(QUERIES, 5, system="bm25")["q1"].ids)
    assert whole.systems["rrf"].corpus is whole.corpus
    assert list(whole.corpus) == list(corpus)


def test_one_query_and_many(whole):
    one = whole.search("matrix rank", 3)
    assert list(one) == ["q"]
    assert one["q"].ids.tolist() == whole.search(QUERIES, 3)["q1"].ids.tolist()
    many = whole.search({"blank": " ", "q1": "matrix rank", "unknown": "xyzzy"}, 3, system="bm25")
    assert list(many) == ["blank", "q1", "unknown"]
    assert [len(many[q]) for q in many] == [0, 3, 0]
    assert len(whole.search({"blank": "\n"})["blank"]) == 0
    assert len(whole.search("matrix", 1000, system="dense")["q"]) == 60


@pytest.mark.parametrize("query", ["", " \n\t"])
def test_an_empty_query_is_refused(whole, query):
    for system in whole.systems:
        with pytest.raises(InputError, match="the query is empty"):
            whole.search(query, system=system)


def test_odd_queries(whole):
    for query in ("matrix rank " * 8500, "\x00", "'; drop table documents --", "\ud800 lone", "é"):
        for system in whole.systems:
            assert len(whole.search(query, 5, system=system)["q"]) <= 5


def test_what_cannot_be_asked(whole):
    with pytest.raises(InputError, match=r"no system 'dens'.*bm25, dense, rrf"):
        whole.search("matrix", system="dens")
    for k in (0, -1, 2.5, True):
        with pytest.raises(InputError, match="k is"):
            whole.search("matrix", k)
    with pytest.raises(InputError, match="queries are a list"):
        whole.search(["matrix"])


def test_several_encoders_and_none(corpus, model, tmp_path):
    both = Index.create(tmp_path / "both", corpus, {"a": model, "b-2": str(model)}, progress=False)
    expected = ["bm25", *(f"{kind}:{name}" for kind in KINDS[1:] for name in ("a", "b-2"))]
    assert list(both.systems) == expected
    assert both.default_system == "rrf:a"
    assert both.search(QUERIES, system="feedback:a") == both.search(QUERIES, system="feedback:b-2")
    with pytest.raises(InputError, match="no system 'dense'"):
        both.search("matrix", system="dense")
    none = Index.create(tmp_path / "none", corpus, None, progress=False)
    assert list(none.systems) == ["bm25"]
    assert none.default_system == "bm25"
    assert none.search(QUERIES) == both.search(QUERIES, system="bm25")


def test_opening_loads_no_model(whole, monkeypatch):
    def never(self, *arguments, **keywords):
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(Encoder, "__init__", never)
    index = Index.open(whole.folder)
    assert len(index) == 60
    assert index.search("matrix", system="bm25")["q"].ids.size
    assert index.encoders["tiny"].dimension == 32
    with pytest.raises(AssertionError, match="a model is loaded"):
        index.search("matrix", system="dense")


def test_an_index_is_found_from_any_directory(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Index.create("index", corpus, None, progress=False)
    opened = Index.open("index")
    monkeypatch.chdir("/")
    assert len(opened.search("matrix")["q"])
    opened.add([Document("new", "a matrix")])
    assert "new" in opened.corpus


def test_reading_changes_nothing(copied):
    def state():
        return {path: path.stat().st_mtime_ns for path in copied.folder.rglob("*")}

    before = state()
    index = Index.open(str(copied.folder))
    index.search("matrix", where="year>=2002")
    index.snippet("matrix", "d3")
    index.verify()
    assert not index.refresh()
    assert state() == before


# -- filters and snippets --------------------------------------------------------------------


@pytest.mark.parametrize("system", KINDS[:4])
@pytest.mark.parametrize(
    ("where", "passes"),
    [
        ({"lang": "de"}, lambda m: m["lang"] == "de"),
        ({"year": {">=": 2002, "<": 2004}}, lambda m: 2002 <= m["year"] < 2004),
        (
            {"year": [2000, 2003], "draft": False},
            lambda m: m["year"] in (2000, 2003) and not m["draft"],
        ),
        (["year != 2001", "tags = x"], lambda m: m["year"] != 2001 and "x" in m["tags"]),
    ],
)  # fmt: skip
def test_filters_find_what_is_best_among_what_passes(whole, system, where, passes):
    passing = {d.id for d in whole.corpus if passes(d.metadata)}
    assert 0 < len(passing) < 60
    found = whole.search(QUERIES, 7, system=system, where=where)
    for query in QUERIES:
        ids = found[query].ids.tolist()
        assert set(ids) <= passing
        if system in ("bm25", "dense"):
            everything = whole.search(QUERIES, 60, system=system)[query].ids.tolist()
            assert ids == [i for i in everything if i in passing][:7]


def test_filters_that_pass_nothing_or_do_not_fit(whole):
    assert len(whole.search("matrix", where={"lang": "fr"})["q"]) == 0
    assert whole.search("matrix", where={}) == whole.search("matrix")
    for where, message in [
        ({"color": 1}, "no such metadata field.*'year'"),
        ({"year": "soon"}, "cannot be compared"),
        ({"year": {"~": 1}}, "operators are"),
        ("lang", "no comparison"),
        ("", "no comparison"),
        (0, "is a int"),
        ({5: 1}, "no such metadata field"),
        ({"lang": 3}, "cannot be compared"),
    ]:
        with pytest.raises(InputError, match=message):
            whole.search("matrix", where=where)


def test_snippets_show_the_best_passage(model, tmp_path):
    long = " ".join(["alpha beta gamma delta"] * 60 + ["matrix"] * 40 + ["zeta theta"] * 60)
    corpus = Corpus(["long", "short"], [long, "spectrum of a tensor"], ["Title", ""])
    index = Index.create(tmp_path / "index", corpus, {"tiny": model}, progress=False)
    passages, _ = index._view.passages("tiny")
    assert len(passages) > 10
    snippet = index.snippet("matrix", "long", system="dense", width=80)
    assert long[snippet.start : snippet.stop] == snippet
    assert "matrix" in snippet
    assert all(snippet[a:b] == "matrix" for a, b in snippet.highlights)
    assert snippet.highlights
    assert index.snippet("tensor", "short", system="bm25") == "spectrum of a tensor"
    assert index.snippet("", "short") == "spectrum of a tensor"
    with pytest.raises(InputError, match="no document 'x'"):
        index.snippet("matrix", "x")
    for system in ("bm25", "rrf"):
        long_, short = (index.snippet("matrix", d, system=system, width=80) for d in corpus.ids)
        shown = index.snippets("matrix", ["short", "long"], system=system, width=80)
        assert shown == [short, long_]
    assert index.snippets("matrix", []) == []


# -- changing ----------------------------------------------------------------------------------


def test_changes_give_what_a_new_index_would(copied, model, tmp_path, encoded):
    documents = {d.id: d for d in copied.corpus}
    new = make_documents(5, start=100)
    copied.add(new)
    assert sorted(encoded) == sorted(d.contents for d in new)
    encoded.clear()
    documents |= {d.id: d for d in new}
    copied.delete(["d3", "d101"])
    assert encoded == []
    for gone in ("d3", "d101"):
        del documents[gone]
    long = Document("d7", " ".join(WORDS * 6), "now long")
    moved = Document("d8", documents["d8"].text, documents["d8"].title, {"year": 1999})
    extra = Document("extra", "a kernel")
    copied.update([long, moved, extra])
    assert all(text.startswith("now long") for text in encoded if text != "a kernel")
    assert len(encoded) > 5
    documents |= {"d7": long, "d8": moved, "extra": extra}
    fresh = Index.create(
        tmp_path / "fresh", Corpus.from_documents(documents.values()), {"tiny": model},
        progress=False,
    )  # fmt: skip
    for index in (copied, Index.open(copied.folder)):
        assert list(index.corpus) == list(fresh.corpus)
        same_results(index, fresh)
    assert copied.search("matrix", 100, where="year=1999", system="dense")["q"].ids.tolist() == [
        "d8"
    ]
    copied.verify()
    assert generations(copied) == [copied.manifest.generation]


def test_deleting_nothing_writes_nothing(copied):
    before = sorted(copied.folder.rglob("*"))
    copied.delete([])
    assert sorted(copied.folder.rglob("*")) == before


def test_changes_that_are_refused(copied):
    before = copied.manifest
    for change, message in [
        (lambda: copied.add([Document("d1", "x")]), "in the index already"),
        (lambda: copied.add([Document("n", "x"), Document("n", "y")]), "occurs twice"),
        (lambda: copied.add([]), "no documents"),
        (lambda: copied.add(["text"]), "is no fullrank.core.Document"),
        (lambda: copied.add([Document("a b", "x")]), "white space"),
        (lambda: copied.delete(["d1", "nope"]), "not in the index, e.g. 'nope'"),
        (lambda: copied.delete(list(copied.corpus.ids)), "every document"),
        (lambda: copied.configure(depht=3), "'depht'"),
        (lambda: copied.configure(depth=0), "'depth'"),
        (lambda: copied.configure(default_system="dense:x"), "default_system"),
    ]:
        with pytest.raises(InputError, match=message):
            change()
    assert Index.open(copied.folder).manifest == before


def test_readers_go_on_with_what_they_opened(copied):
    reader = Index.open(copied.folder)
    lazy = Index.open(copied.folder)
    stages = Index.open(copied.folder).systems
    expected = reader.search(QUERIES, 50)
    copied.delete(["d1", "d2"])
    copied.add(make_documents(1, start=200))
    assert reader.search(QUERIES, 50) == expected
    assert lazy.search(QUERIES, 50) == expected  # opened, but nothing read until now
    assert len(stages["rrf"](QUERIES)["q1"]) == 60
    assert "d1" in reader.corpus
    assert reader.refresh()
    assert not reader.refresh()
    assert "d1" not in reader.corpus
    assert reader.search(QUERIES, 50) == copied.search(QUERIES, 50)
    del lazy, stages
    copied.add(make_documents(1, start=201))
    assert generations(copied) == [3, 4]  # the reader has 3
    assert len(reader) == 59
    reader.refresh()
    copied.configure(depth=50)
    assert generations(copied) == [4]


def test_settings_are_kept_and_used(copied):
    copied.configure(default_system="weighted", weights=(1.0, 0.0), depth=7, feedback_weight=0.0)
    opened = Index.open(copied.folder)
    assert opened.default_system == "weighted"
    assert opened.settings.depth == 7
    lexical = opened.search(QUERIES, 5, system="bm25")
    found = opened.search(QUERIES, 5)
    assert [found[q].ids[0] for q in QUERIES] == [lexical[q].ids[0] for q in QUERIES]
    assert len(opened.systems["dense"](QUERIES)["q1"]) == 7
    assert len(opened.search("matrix", 20, system="dense")["q"]) == 20


def test_bm25_options_survive_changes(corpus, tmp_path):
    options = {"method": "bm25+", "k1": 0.9, "b": 0.4, "stopwords": None}
    index = Index.create(tmp_path / "i", corpus, None, bm25=options, progress=False)
    index.add(make_documents(3, start=100))
    expected = BM25(index.corpus, **options)(QUERIES)
    assert index.search(QUERIES, 100) == expected
    for bad in ({"k2": 1}, {"method": "tfidf"}, {"k1": -1}):
        with pytest.raises(InputError):
            Index.create(tmp_path / "j", corpus, None, bm25=bad, progress=False)
    assert not (tmp_path / "j").exists()


# -- models --------------------------------------------------------------------------------------


def test_a_folder_moves_with_the_models_beside_it(corpus, tmp_path):
    home = tmp_path / "home of models"
    model = save_encoder(home / "models", WORDS)
    index = Index.create(home / "index", corpus, {"tiny": model}, progress=False)
    assert index.manifest.encoders["tiny"].model == "../models/model"
    expected = index.search(QUERIES, system="dense")
    moved = tmp_path / "elsewhere"
    home.rename(moved)
    assert Index.open(moved / "index").search(QUERIES, system="dense") == expected
    (moved / "models").rename(tmp_path / "models")
    alone = Index.open(moved / "index")
    with pytest.raises(StoreError, match="the model of encoder 'tiny' is not at"):
        alone.search("matrix", system="dense")
    assert alone.search("matrix", system="bm25")["q"].ids.size
    found = Index.open(moved / "index", encoders={"tiny": tmp_path / "models" / "model"})
    assert found.search(QUERIES, system="dense") == expected
    with pytest.raises(InputError, match="no encoder 'other'; it has tiny"):
        Index.open(moved / "index", encoders={"other": model})


def test_a_model_in_memory_is_copied_into_the_index(corpus, model, tmp_path):
    encoder = Encoder(Encoder(model).model, max_tokens=16)
    assert encoder.source is None
    index = Index.create(tmp_path / "index", corpus, {"mine": encoder}, progress=False)
    assert index.manifest.encoders["mine"].home == "inside"
    assert index.encoders["mine"].max_tokens == 16
    expected = index.search(QUERIES, system="dense")
    index.add([Document("new", "zeta")])
    opened = Index.open((tmp_path / "index").rename(tmp_path / "moved"))
    opened.delete(["new"])
    assert Index.open(opened.folder).search(QUERIES, system="dense") == expected


def test_a_model_in_memory_keeps_its_shorter_vectors(corpus, model, tmp_path):
    short = SentenceTransformer(str(model), device="cpu", truncate_dim=8)
    made = Index.create(tmp_path / "index", corpus, {"short": short}, progress=False)
    opened = Index.open(made.folder)
    assert opened.encoders["short"].dimension == 8
    same_results(made, opened)


def test_another_model_in_the_old_place_is_noticed(corpus, tmp_path):
    model = save_encoder(tmp_path / "m", WORDS)
    index = Index.create(tmp_path / "index", corpus, {"tiny": model}, progress=False)
    shutil.rmtree(model)
    save_encoder(tmp_path / "m", WORDS, seed=1)
    opened = Index.open(index.folder)
    assert opened.search("matrix", system="bm25")["q"].ids.size
    for change in (
        lambda: opened.search("matrix", system="rrf"),
        lambda: opened.add([Document("new", "zeta")]),
    ):
        with pytest.raises(StoreError, match="is not the one that made the vectors"):
            change()
    opened.delete(["d1"])  # needs no model
    again = Index.create(index.folder, corpus, {"tiny": model}, progress=False)
    assert again.search("matrix", system="rrf")["q"].ids.size


def test_training_on_does_not_change_an_index(corpus, model, tmp_path):
    import torch

    encoder = Encoder(model)
    index = Index.create(tmp_path / "index", corpus, encoder, progress=False)
    assert list(index.encoders) == ["model"]
    expected = index.search(QUERIES, system="dense")
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    assert encoder.source is None
    assert index.search(QUERIES, system="dense") == expected
    tuned = Index.create(tmp_path / "tuned", corpus, {"tuned": encoder}, progress=False)
    assert tuned.search(QUERIES, system="dense") != expected
    assert Index.open(tuned.folder).search(QUERIES, system="dense") == tuned.search(
        QUERIES, system="dense"
    )


def test_names_and_models_that_will_not_do(corpus, tmp_path):
    for encoders, message in [
        ("/nowhere/at all", "no model at"),
        ({"a b": "x"}, "the encoder name 'a b' will not do"),
        ({"../x": "x"}, "will not do"),
        ({"x": 3}, "the model is a int"),
        (tmp_path, "no model"),
    ]:
        with pytest.raises(InputError, match=message):
            Index.create(tmp_path / "index", corpus, encoders, progress=False)
    assert not (tmp_path / "index").exists()


# -- vectors that are there already --------------------------------------------------------------


def test_vectors_from_outside(corpus, model, tmp_path, encoded):
    vectors = np.random.default_rng(0).normal(size=(60, 32))
    index = Index.create(
        tmp_path / "i", corpus, {"tiny": model}, vectors={"tiny": vectors}, progress=False
    )
    assert encoded == []
    unit = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    query = Encoder(model).encode(["matrix"], kind="query")[0]
    assert index.search("matrix", 1, system="dense")["q"].ids[0] == f"d{np.argmax(unit @ query)}"
    index.add([Document("new", "zeta")])
    stored = np.load(generation_folder(index.folder, 2) / "vectors" / "tiny.npy")
    np.testing.assert_allclose(stored[:60], unit, atol=1e-6)
    for bad, message in [
        (vectors[:3], "a row for each of 60"),
        (vectors[:, :3], "have length 3"),
        (np.full((60, 32), np.nan), "not a finite number"),
        (vectors.astype(str), "not a finite number"),
        (vectors[0], "have shape"),
    ]:
        with pytest.raises(InputError, match=message):
            Index.create(
                tmp_path / "j", corpus, {"tiny": model}, vectors={"tiny": bad}, progress=False
            )
    with pytest.raises(InputError, match="no encoder of that name"):
        Index.create(tmp_path / "j", corpus, None, vectors={"x": vectors}, progress=False)


def test_what_was_encoded_is_not_encoded_again(corpus, model, tmp_path, encoded):
    cache = tmp_path / "cache"
    first = Index.create(tmp_path / "a", corpus, {"t": model}, cache=cache, progress=False)
    assert len(encoded) == 60
    assert not (first.folder / ".work").exists()
    encoded.clear()
    other = Index.create(tmp_path / "b", corpus, {"t": model}, cache=cache, progress=False)
    assert encoded == []
    same_results(first, other)
    next(cache.rglob("*.npy")).write_bytes(b"\x93NUMPY torn")  # a damaged cache is no cache
    third = Index.create(tmp_path / "c", corpus, {"t": model}, cache=cache, progress=False)
    assert len(encoded) == 60
    same_results(first, third)
    encoded.clear()
    more = Corpus.from_documents([*corpus, *make_documents(2, start=300)])
    Index.create(tmp_path / "a", more, {"t": model, "u": model}, progress=False)
    assert len(encoded) == 2  # what the replaced index had is taken over, by both


def test_a_snapshot_stays(copied):
    taken = copied.snapshot()
    expected = taken.search(QUERIES, 50)
    copied.delete(["d1"])
    assert "d1" in taken.corpus
    assert taken.search(QUERIES, 50) == expected
    assert taken.refresh()
    assert "d1" not in taken.corpus
    assert taken.search(QUERIES, 50) == copied.search(QUERIES, 50)


def test_what_vanishes_while_an_index_is_open_is_named(copied):
    generation = generation_folder(copied.folder, 1)
    for gone, ask, said in (
        ("lance/documents.lance", lambda index: len(index.corpus), "the documents cannot be read"),
        ("bm25", lambda index: index.search("matrix", system="bm25"), "no BM25 index"),
        (
            "vectors/tiny.npy",
            lambda index: index.search("matrix", system="dense"),
            "the vectors of 'tiny' cannot be read",
        ),
    ):
        index = Index.open(copied.folder)
        (generation / gone).rename(copied.folder / "away")
        with pytest.raises(StoreError, match=said):
            ask(index)
        (copied.folder / "away").rename(generation / gone)
        ask(index)  # tried again, not remembered


# -- threads -------------------------------------------------------------------------------------


def test_threads_search_while_one_writes(copied):
    before = copied.search(QUERIES, 5)
    failures, seen = [], []
    done = threading.Event()

    def search():
        try:
            while not done.is_set():
                run = copied.search(QUERIES, 5)
                seen.append(run)
                copied.snippet("matrix", run["q1"].ids[0], system="bm25")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=search) for _ in range(6)]
    for thread in threads:
        thread.start()
    for round_ in range(3):
        copied.add([Document(f"new{round_}", "matrix rank " * (round_ + 1))])
    done.set()
    for thread in threads:
        thread.join()
    assert failures == []
    assert before in seen
    assert len(copied) == 63
    assert copied.search(QUERIES, 5)["q1"].ids.tolist() != before["q1"].ids.tolist()


def test_first_use_in_many_threads_loads_once(whole, monkeypatch):
    loads = []
    original = Encoder.__init__

    def counting(self, *arguments, **keywords):
        loads.append(1)
        original(self, *arguments, **keywords)

    monkeypatch.setattr(Encoder, "__init__", counting)
    index = Index.open(whole.folder)
    runs = []
    threads = [
        threading.Thread(target=lambda: runs.append(index.search(QUERIES))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert len(runs) == 8
    assert all(run == runs[0] for run in runs)
