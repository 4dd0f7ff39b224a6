"""The parts of an index by themselves: filters, snippets, vectors, holds on generations."""

import copy
import pickle
import random
import resource

import numpy as np
import pyarrow as pa
import pytest

from fullrank.core import Corpus, Document, InputError
from fullrank.retrieval import index_snippet
from fullrank.retrieval.index_filters import Condition, matching, parse_where
from fullrank.retrieval.index_reading import ReadHold, remove_unless_read
from fullrank.retrieval.index_snippet import best_snippet
from fullrank.retrieval.index_tables import (
    StoredCorpus,
    read_passages,
    write_documents,
    write_passages,
)
from fullrank.retrieval.index_vectors import (
    VectorCache,
    VectorSource,
    encode_missing,
    text_digests,
    write_vectors,
)
from fullrank.retrieval.passages import Passages

# -- filters ---------------------------------------------------------------------------------

COLUMNS = {
    "year": pa.array([1999, 2005, None, 2010]),
    "price": pa.array([0.5, 1.0, 2.0, None]),
    "lang": pa.array(["en", "de", None, "en"], pa.large_string()),
    "draft": pa.array([True, False, None, True]),
    "tags": pa.array([["a", "b"], [], None, ["b"]], pa.list_(pa.large_string())),
}


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ({"year": 2005}, [1]),
        ("year!=2005", [0, 3]),
        ("year > 2004.5", [1, 3]),
        ({"year": {">=": 1999, "<": 2010}}, [0, 1]),
        ({"year": [1999, 2010, 7]}, [0, 3]),
        ({"year": {"in": [2005]}}, [1]),
        ({"year": 2005.5}, []),
        ({"price": {"<=": 1}}, [0, 1]),
        ("lang=en", [0, 3]),
        ("lang == de", [1]),
        ({"lang": {">": "de"}}, [0, 3]),
        ({"draft": True}, [0, 3]),
        ("draft=False", [1]),
        ({"tags": "b"}, [0, 3]),
        ({"tags": ["a", "z"]}, [0]),
        ("tags!=a", [1, 3]),
        ("year>=2e3", [1, 3]),
        ("year=2005.0", [1]),
        (["tags=b", "year<2000"], [0]),
        ({"year": [2005, 2010.0, 1999.5]}, [1, 3]),
        ({"year": {"<": 2005.5}}, [0, 1]),
        ("year<99999999999999999999", [0, 1, 3]),
        ("year<=-99999999999999999999", []),
        ({"year": [10**30, 2005]}, [1]),
    ],
)
def test_filters(where, expected):
    mask = matching(parse_where(where), COLUMNS.__getitem__)
    assert mask.dtype == bool
    assert np.flatnonzero(mask).tolist() == expected


@pytest.mark.parametrize(
    "where", ["", "year", "year=", "=3", " =3", "year~3", {"year": {"like": 3}}, [3], 5, None]
)
def test_filters_that_cannot_be_read(where):
    with pytest.raises(InputError, match="filter"):
        parse_where(where)


@pytest.mark.parametrize(
    "where",
    [
        {"year": "x"},
        {"lang": 3},
        {"draft": "maybe"},
        {"year": None},
        {"tags": 1},
        {"lang": {"in": "en"}},
        {"year": 10**400},
        {"year": [True]},
    ],
)
def test_filters_of_another_type(where):
    with pytest.raises(InputError, match="cannot be compared"):
        matching(parse_where(where), COLUMNS.__getitem__)


def test_filter_values_are_never_code():
    assert parse_where("lang=en' OR 1=1 --") == (Condition("lang", "==", "en' OR 1=1 --"),)
    assert not matching(parse_where("lang=en' OR 1=1 --"), COLUMNS.__getitem__).any()


# -- snippets --------------------------------------------------------------------------------


def test_snippets_keep_their_place():
    draw = random.Random(0)
    words = ["matrix", "Rank", "of", "a", "spectrum.", "norm\n\n", "x" * 50, "é", "values,"]
    for _ in range(300):
        text = " ".join(draw.choices(words, k=draw.randrange(80)))
        document = Document("d", text, draw.choice(["", "A title"]))
        query = " ".join(draw.choices(words, k=draw.randrange(4)))
        length = len(document.contents)
        within = None if draw.random() < 0.5 else sorted(draw.choices(range(length + 1), k=2))
        snippet = best_snippet(query, document, within=within, width=draw.choice([20, 120]))
        shown = text or document.title
        assert shown[snippet.start : snippet.stop] == snippet
        assert len(snippet) <= 120
        assert snippet == snippet.strip()
        for a, b in snippet.highlights:
            assert 0 <= a < b <= len(snippet)
            assert snippet[a:b].isalnum()


def test_snippets_are_of_the_part_that_matters():
    text = "First things first. " * 20 + "Here the nuclear norms are computed. " + "The end. " * 40
    snippet = best_snippet("nuclear norm", Document("d", text), width=100)
    assert snippet.startswith("Here the nuclear norms")
    assert [snippet[a:b] for a, b in snippet.highlights] == ["nuclear", "norms"]
    assert best_snippet("the", Document("d", "On the roof")).highlights == ((3, 6),)
    assert best_snippet("roof the", Document("d", "On the roof")).highlights == ((7, 11),)
    inside = best_snippet("zzz", Document("d", text, "Title"), within=(6 + 400, 6 + 440))
    assert inside == "Here the nuclear norms are computed. The"
    assert best_snippet("x", Document("d", "", "Only a title")) == "Only a title"


def test_words_are_found_by_their_stems_however_they_are_written():
    text = "İSTANBUL and Istanbul's RANKING of 𝒳-ranks; prank, ranked_by, rank"
    found = best_snippet("ranks istanbul ranked_by", Document("d", text))
    assert [found[a:b] for a, b in found.highlights] == [
        "İSTANBUL", "Istanbul", "RANKING", "ranks", "ranked_by", "rank"
    ]  # fmt: skip


def test_a_rare_word_is_found_behind_thousands_of_others():
    text = "The matrix stands here, and here is a matrix. " * 4000 + "A rare eigenvalue, at last."
    found = best_snippet("matrix eigenvalue", Document("d", text, "Title"), width=60)
    assert found == "A rare eigenvalue, at last."
    query = "matrix " + " ".join(f"word{i}" for i in range(100_000))
    assert best_snippet(query, Document("d", text)).highlights


def test_a_huge_word_is_not_read_again_for_every_place_in_it(monkeypatch):
    class Counted:
        """A pattern that counts the characters it reads."""

        def __init__(self, pattern):
            self.pattern, self.read = pattern, 0

        def match(self, text, at):
            found = self.pattern.match(text, at)
            self.read += len(found[0]) if found else 0
            return found

    patterns = [Counted(getattr(index_snippet, name)) for name in ("_LETTER", "_WORD", "_INSIDE")]
    text = "".join(random.Random(0).choices("0123456789abcdef", k=200_000)) + " an end"
    for name, pattern in zip(("_LETTER", "_WORD", "_INSIDE"), patterns, strict=True):
        monkeypatch.setattr(index_snippet, name, pattern)
    found = index_snippet._hits(text, 0, len(text), frozenset({"a", "end"}))
    assert found == [(200_004, 200_007, "end")]
    assert sum(pattern.read for pattern in patterns) < 2 * len(text)


# -- vectors ---------------------------------------------------------------------------------


class Letters:
    """Encodes a text as the counts of four letters."""

    def __init__(self):
        self.seen = []

    def encode(self, texts, kind):
        assert kind == "document"
        self.seen += texts
        return np.array([[t.count(c) for c in "abcd"] for t in texts], dtype=np.float32)


def test_vectors_are_encoded_once_and_written_in_order(tmp_path):
    encoder, cache = Letters(), VectorCache(tmp_path / "cache", "key", 4)
    texts = ["a", "bb", "a", "abcd", ""]
    digests = text_digests("key", texts)
    source = VectorSource()
    assert encode_missing(encoder, texts, digests, source, cache, progress=False) == 4
    vectors = write_vectors(tmp_path / "v" / "x.npy", digests, source, 4)
    assert isinstance(vectors, np.memmap)
    assert not vectors.flags.writeable
    assert vectors.tolist() == [[1, 0, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1], [0] * 4]
    again = VectorSource()
    VectorCache(tmp_path / "cache", "key", 4).read_into(again)
    assert encode_missing(encoder, [*texts, "d"], text_digests("key", [*texts, "d"]), again, cache,
                          progress=False) == 1  # fmt: skip
    assert encoder.seen == ["a", "bb", "abcd", "", "d"]
    other = VectorSource()
    VectorCache(tmp_path / "cache", "key", 5).read_into(other)  # another dimension
    VectorCache(tmp_path / "cache", "other key", 4).read_into(other)
    assert digests[0].tobytes() not in other


def test_a_cache_of_more_files_than_may_be_open(tmp_path):
    cache, count = VectorCache(tmp_path, "k" * 24, 3), 200
    texts = [f"text {i}" for i in range(count)]
    digests = text_digests("k", texts)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, hard))
    try:
        kept = [cache.put(digests[i : i + 1], np.full((1, 3), i, np.float32)) for i in range(count)]
        source = VectorSource()
        cache.read_into(source)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [int(source[d.tobytes()][0]) for d in digests] == list(range(count))
    assert [int(vectors[0, 0]) for vectors in kept] == list(range(count))
    damaged = sorted(cache.folder.glob("*.npy"))[:3]
    damaged[0].write_bytes(b"")
    damaged[1].write_bytes(damaged[1].read_bytes()[:-4])
    np.save(damaged[2], np.array([None]), allow_pickle=True)
    source = VectorSource()
    cache.read_into(source)
    assert sum(d.tobytes() in source for d in digests) == count - 3


def test_digests_tell_encoders_and_texts_apart():
    digests = np.concatenate([text_digests(k, ["a", "b", "\ud800", ""]) for k in ("k", "k2")])
    assert len({d.tobytes() for d in digests}) == 8


# -- tables ----------------------------------------------------------------------------------


def test_tables_give_back_what_was_written(tmp_path, monkeypatch):
    monkeypatch.setattr("fullrank.retrieval.index_tables._BATCH", 3)
    corpus = Corpus(
        ["a", "b", "c"], ["x\x00y", "", "z" * 70_000], ["", "é", "t"], [{}, {"n": 1}, {"m": [1]}]
    )
    write_documents(tmp_path, corpus)
    stored = StoredCorpus(tmp_path)
    assert list(stored) == list(corpus)
    assert stored.fingerprint == corpus.fingerprint
    assert list(pickle.loads(pickle.dumps(stored))) == list(corpus)
    assert list(copy.copy(StoredCorpus(tmp_path))) == list(corpus)
    with pytest.raises(AttributeError):
        _ = stored.nothing
    document = np.array([0, 1, 2, 2, 2, 2, 2])
    passages = Passages(document, np.arange(7), np.arange(7) + 5, np.arange(7) % 2)
    digests = text_digests("k", [str(i) for i in range(7)])
    vectors = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    write_passages(tmp_path, "x-1.b", corpus, passages, digests, vectors)
    read, found = read_passages(tmp_path, "x-1.b")
    for column in ("document", "start", "stop", "lead"):
        np.testing.assert_array_equal(getattr(read, column), getattr(passages, column))
    np.testing.assert_array_equal(found, digests)
    import lancedb

    table = lancedb.connect(str(tmp_path / "lance")).open_table("passages-x-1.b")
    hit = table.search(vectors[4]).limit(1).to_list()[0]
    assert (hit["id"], hit["row"], hit["start"]) == ("c", 4, 4)


# -- holds -----------------------------------------------------------------------------------


def test_a_held_folder_stays(tmp_path):
    folder = tmp_path / "generation"
    (folder / "inside").mkdir(parents=True)
    first, second = ReadHold(folder), ReadHold(folder)
    assert not remove_unless_read(folder)
    first.release()
    first.release()
    assert not remove_unless_read(folder)
    del second
    assert remove_unless_read(folder)
    assert not remove_unless_read(folder)
    with pytest.raises(FileNotFoundError):
        ReadHold(folder)
