"""Passages cover their documents, fit the encoder, and overlap."""

import random

import numpy as np
import pytest
from tiny_models import WORDS, sentence_model

from fullrank.core import Corpus, InputError
from fullrank.retrieval import Encoder, Passages, split_passages


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return Encoder(sentence_model(tmp_path_factory.mktemp("model")), dtype="float32", max_tokens=20)


def prose(words, seed=0):
    draw = random.Random(seed)
    return " ".join(draw.choices([w for w in WORDS if w.isalpha()], k=words))


def tokens(encoder, text):
    return len(encoder.tokenizer(text)["input_ids"])


@pytest.fixture(scope="module")
def corpus():
    return Corpus(
        ["short", "long", "titled", "empty", "huge-title"],
        [prose(5), prose(100, 1), prose(60, 2), "", prose(40, 4)],
        ["", "", "red fish", "", prose(30, 3)],
    )


def test_short_documents_stay_whole(encoder, corpus):
    passages = split_passages(corpus, encoder)
    for row in (0, 3):
        mine = passages.of(row)
        assert mine.stop - mine.start == 1
        assert passages.text(corpus.contents, mine.start) == corpus.contents[row]


def test_passages_cover_and_fit(encoder, corpus):
    passages = split_passages(corpus, encoder)
    texts = passages.texts(corpus.contents)
    assert len(texts) == len(passages)
    assert passages.documents == len(corpus)
    assert not passages.single
    for row, contents in enumerate(corpus.contents):
        mine = range(*passages.of(row).indices(len(passages)))
        assert passages.start[mine[0]] == 0
        assert passages.stop[mine[-1]] == len(contents)
        for p in mine[1:]:
            assert passages.start[p] < passages.stop[p - 1]
            assert passages.start[p] > passages.start[p - 1]
    assert max(tokens(encoder, text) for text in texts) <= 20
    assert sum(tokens(encoder, text) == 20 for text in texts) > len(texts) / 2


def test_titles_lead_later_passages(encoder, corpus):
    passages = split_passages(corpus, encoder)
    texts = passages.texts(corpus.contents)
    titled = texts[passages.of(2)]
    assert len(titled) > 3
    assert all(text.startswith("red fish\n") for text in titled)
    shown = passages.text(corpus.contents, passages.of(2).start + 1)
    assert "red fish\n" not in shown
    # A title that would fill the passage is not repeated.
    long_title = corpus.titles[4]
    assert not any(text.startswith(long_title[:20]) for text in texts[passages.of(4)][1:])


def test_cuts_are_between_words(encoder):
    words = prose(80, 5).split()
    corpus = Corpus(["a"], [" ".join(words)])
    passages = split_passages(corpus, encoder)
    for text in passages.texts(corpus.contents):
        assert set(text.split()) <= set(words)


def test_overlap(encoder):
    corpus = Corpus(["a"], [prose(200)])
    none, some, most = (len(split_passages(corpus, encoder, overlap=o)) for o in (0, 0.25, 0.9))
    assert none < some < most
    with pytest.raises(InputError, match="overlap"):
        split_passages(corpus, encoder, overlap=1)


def test_the_prompt_takes_room(tmp_path):
    model = sentence_model(tmp_path)
    bare = Encoder(model, dtype="float32", max_tokens=20)
    prompted = Encoder(model, dtype="float32", max_tokens=20, document_prompt="one two three four ")
    corpus = Corpus(["a"], [prose(100)])
    passages = split_passages(corpus, prompted)
    assert len(passages) > len(split_passages(corpus, bare))
    assert (
        max(tokens(bare, prompted.prompt("document") + t) for t in passages.texts(corpus.contents))
        <= 20
    )


def test_one_word_longer_than_a_passage(tmp_path):
    encoder = Encoder(max_tokens=8, dtype="float32")
    corpus = Corpus(["a", "b"], ["x" * 90, "日本語" * 40])
    passages = split_passages(corpus, encoder)
    texts = passages.texts(corpus.contents)
    assert len(texts) > 4
    assert encoder.encode(texts).shape == (len(texts), 384)


def test_a_document_of_1_mb(encoder):
    corpus = Corpus(["a", "b"], ["rank and value " * 70_000, "short"])
    passages = split_passages(corpus, encoder)
    assert passages.of(1) == slice(len(passages) - 1, len(passages))
    assert len(passages) > 10_000


def test_odd_characters(encoder):
    text = ("naïve 🤖 \u0301 ﷺ \ud800 tab\t" * 30).strip()
    passages = split_passages(Corpus(["a"], [text.replace("\ud800", "?")]), encoder)
    assert passages.start[0] == 0
    assert passages.stop[-1] == len(text)


def test_broken_unicode_keeps_its_places(encoder):
    broken, whole = ("one \ud800 two " * 40, "one ? two " * 40)
    pieces = [split_passages(Corpus(["d"], [text]), encoder) for text in (broken, whole)]
    assert pieces[0].start.tolist() == pieces[1].start.tolist()
    assert len(pieces[0]) > 1


def test_without_a_fast_tokenizer_documents_stay_whole(encoder, corpus, monkeypatch):
    class Slow:
        backend_tokenizer = None

    monkeypatch.setattr(encoder, "tokenizer", Slow())
    assert split_passages(corpus, encoder).single


@pytest.mark.parametrize(
    "document", [[1, 2], [0, 2], [0, 1, 0], [[0, 1]]], ids=["late", "gap", "back", "deep"]
)
def test_bad_tables(document):
    rows = np.array(document)
    with pytest.raises(InputError):
        Passages(rows, np.zeros_like(rows), np.ones_like(rows))
    with pytest.raises(InputError, match="length"):
        Passages(np.array([0, 1]), np.array([0]), np.array([1, 2]))
