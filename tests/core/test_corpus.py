"""Documents and their ids."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fullrank.core import Corpus, Document, InputError
from fullrank.core.corpus import check_id


@given(st.lists(st.text("abé0", min_size=1, max_size=3), min_size=1, max_size=6, unique=True))
def test_columns_and_documents_agree(ids):
    documents = [
        Document(i, text=f"text of {i}", title="" if row % 2 else i.upper(), metadata={"row": row})
        for row, i in enumerate(ids)
    ]
    corpus = Corpus.from_documents(documents)
    assert list(corpus) == documents
    assert corpus.ids == tuple(ids)
    assert corpus.contents == tuple(d.contents for d in documents)
    for row, i in enumerate(ids):
        assert corpus[i] == documents[row]
        assert corpus.row(i) == row
        assert i in corpus
    assert Corpus.from_documents(corpus).fingerprint == corpus.fingerprint


def test_contents_are_title_and_text():
    assert Document("a", "text").contents == "text"
    assert Document("a", "text", "title").contents == "title\ntext"
    assert repr(Corpus(["a"], ["x"])) == "Corpus(1 documents)"


def test_one_document_and_a_large_one():
    large = "word " * 200_000
    corpus = Corpus(["a"], [large])
    assert len(corpus) == 1
    assert corpus["a"].text == large


def test_the_fingerprint_tells_columns_apart():
    def fingerprint(*columns):
        return Corpus(*columns).fingerprint

    prints = {
        fingerprint(["a", "b"], ["x", "y"]),
        fingerprint(["b", "a"], ["x", "y"]),
        fingerprint(["a", "b"], ["xy", ""]),
        fingerprint(["a", "b"], ["", "y"], ["x", ""]),
        fingerprint(["a", "b"], ["x", "y"], ["", "z"]),
    }
    assert len(prints) == 5
    # Half a surrogate pair, as broken JSON brings it, is text too.
    assert fingerprint(["a"], ["\ud800"]) != fingerprint(["a"], ["?"])


def test_subset_keeps_the_order_of_the_corpus():
    corpus = Corpus(["a", "b", "c"], ["x", "y", "z"], metadata=[{"n": n} for n in range(3)])
    subset = corpus.subset(["c", "a"])
    assert subset.ids == ("a", "c")
    assert subset["c"].metadata == {"n": 2}
    with pytest.raises(InputError, match=r"1 ids are not in the corpus, e\.g\. 'd'"):
        corpus.subset(["a", "d"])
    with pytest.raises(InputError, match="corpus is empty"):
        corpus.subset([])


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (([], []), "corpus is empty"),
        ((["a", "b"], ["x"]), "2 ids but 1 texts"),
        ((["a"], ["x"], ["t", "u"]), "1 ids but 2 titles"),
        ((["a"], ["x"], None, []), "1 ids but 0 metadata"),
        ((["a", "b", "a"], ["x", "y", "z"]), r"'a' occurs twice \(rows 0 and 2\)"),
        ((["a b"], ["x"]), "white space"),
        (([""], ["x"]), "empty or holds white space"),
        (([7], ["x"]), "is a int; ids are strings"),
        ((["a"], [None]), "its text is a NoneType"),
        ((["a"], ["x"], [3]), "its title is a int"),
    ],
)
def test_bad_columns(columns, says):
    with pytest.raises(InputError, match=says):
        Corpus(*columns)


@pytest.mark.parametrize("bad", ["a b", "a\n", "\ta", "a\u00a0b", "a\u2028", ""])
def test_no_white_space_of_any_kind_in_ids(bad):
    with pytest.raises(InputError, match="white space"):
        check_id(bad, "query")


def test_an_unknown_document_is_named():
    with pytest.raises(InputError, match="no document 'b' in this corpus of 1"):
        Corpus(["a"], ["x"])["b"]
