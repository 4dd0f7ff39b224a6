import gzip

import pytest

from fullrank.core import InputError
from fullrank.datasets import read_corpus, read_dataset


def test_files_and_folders(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "text": "x"}')
    (tmp_path / "b.tsv.gz").write_bytes(gzip.compress(b"b\tx\n"))
    (tmp_path / "c.xml").write_text("<DOC><DOCNO>c</DOCNO>x</DOC>")
    (tmp_path / "d.md").write_text("# Title\n")
    (tmp_path / "e.dat").write_text('{"id": "e", "text": "x"}')
    found = {name: read_corpus(tmp_path / name).ids for name in ("a.jsonl", "b.tsv.gz", "c.xml")}
    assert found == {"a.jsonl": ("a",), "b.tsv.gz": ("b",), "c.xml": ("c",)}
    assert read_corpus(str(tmp_path / "d.md")).ids == ("d.md",)
    assert read_corpus(tmp_path / "e.dat").ids == ("e",)
    assert read_corpus(tmp_path).ids == ("d.md",)


@pytest.mark.parametrize(
    ("name", "text", "ids"),
    [
        ("a.md", "{% include %}\nwords", ("a.md",)),
        ("a.rst", "<doc>: a tag\n", ("a.rst",)),
        ("a.txt", "{x} is a set", ("a.txt",)),
        ("a.txt", "{\n}", ("a.txt",)),
        ("a.txt", "<document-title>\nwords", ("a.txt",)),
        ("a.txt", '{"id": "d", "text": "x"}\n', ("d",)),
        ("a.txt", '\n <Doc id="1">\n<DOCNO>d</DOCNO>x</DOC>', ("d",)),
    ],
)
def test_a_text_may_begin_like_another_form(tmp_path, name, text, ids):
    (tmp_path / name).write_text(text)
    assert read_corpus(tmp_path / name).ids == ids


def test_beir_folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d1", "text": "x"}')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "what"}')
    (tmp_path / "qrels" / "dev.tsv").write_text("q1\td1\t1\n")
    assert read_corpus(tmp_path).ids == ("d1",)
    assert read_dataset(tmp_path, split="dev").qrels == {"q1": {"d1": 1}}


def test_what_cannot_be_told(tmp_path):
    (tmp_path / "x.bin").write_text("words\n")
    for source in (tmp_path / "x.bin", "no-such-thing", "unknown:thing"):
        with pytest.raises(InputError, match=r"expected a \.jsonl"):
            read_corpus(source)
    for source in (tmp_path / "x.bin", "no-such-thing"):
        with pytest.raises(InputError, match="no collection with queries"):
            read_dataset(source)
    with pytest.raises(InputError, match="no collection with queries"):
        read_dataset(tmp_path)


@pytest.mark.data
def test_named_collection(data_folder, monkeypatch):
    monkeypatch.setenv("FULLRANK_DATA", str(data_folder))
    assert len(read_corpus("cranfield")) == 1400
    assert len(read_dataset("cranfield").queries) == 225
    monkeypatch.chdir(data_folder)  # where "vaswani" is a folder too
    assert len(read_dataset("vaswani").queries) == 93
    assert len(read_corpus(data_folder / "vaswani")) == 11_429
