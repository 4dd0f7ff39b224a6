"""JSON lines and tab-separated files, and what every line reader shares."""

import gzip
import json

import pytest

from fullrank.core import InputError
from fullrank.datasets import jsonl, tsv


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


class TestJsonl:
    def test_fields(self, write):
        path = write(
            "docs.jsonl",
            '{"_id": "a", "title": "T", "text": "x", "metadata": {"url": "u"}, "year": 3}\n'
            '\n{"_id": 2, "text": "y", "title": null}\r\n',
        )
        corpus = jsonl(path)
        assert corpus.ids == ("a", "2")
        assert corpus.texts == ("x", "y")
        assert corpus.titles == ("T", "")
        assert corpus.metadata == ({"year": 3, "url": "u"}, {})

    def test_named_fields(self, write):
        path = write("docs.jsonl", '{"key": "a", "head": "H", "body": "B", "id": 9}')
        document = jsonl(path, id_field="key", text_field="body", title_field="head")["a"]
        assert (document.title, document.text, document.metadata) == ("H", "B", {"id": 9})

    def test_compressed_and_byte_order_mark(self, write):
        path = write("docs.jsonl.gz", gzip.compress(b'\xef\xbb\xbf{"id": "a", "text": "x"}\n'))
        assert jsonl(path).ids == ("a",)
        assert jsonl(str(path).removesuffix(".gz")).ids == ("a",)

    def test_a_document_of_a_megabyte(self, write):
        text = "wörd " * 200_000
        path = write("big.jsonl", json.dumps({"id": "a", "text": text}, ensure_ascii=False))
        assert jsonl(path)["a"].text == text

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ('{"id": "b", "text": ', "line 2: not JSON .*column"),
            ('["b", "text"]', "line 2: expected an object"),
            ('{"id": "b"}', "line 2: no 'text' among the keys .*text_field="),
            ('{"text": "b"}', "line 2: none of the keys .*id_field="),
            ('{"id": "a", "text": "again"}', "line 2: document id 'a' occurs twice.*line 1"),
            ('{"id": "b c", "text": "x"}', "line 2: document id 'b c' is empty or holds white"),
            ('{"id": "", "text": "x"}', "line 2: document id '' is empty"),
            ('{"id": 1.5, "text": "x"}', "line 2: document id 1.5 is a float"),
            ('{"id": true, "text": "x"}', "line 2: document id True is a bool"),
            ('{"id": "b", "text": null}', "line 2: the text of document 'b' is null"),
            ('{"id": "b", "text": "x", "title": [1]}', "line 2: the title .* is a list"),
            ("[" * 100_000, "line 2: cannot be read as JSON"),
        ],
    )
    def test_bad_line_is_named(self, write, line, message):
        path = write("docs.jsonl", f'{{"id": "a", "text": "x"}}\n{line}\n')
        with pytest.raises(InputError, match=message) as caught:
            jsonl(path)
        assert str(path) in str(caught.value)
        assert len(str(caught.value)) < 500

    def test_other_bytes_are_located(self, write):
        path = write("docs.jsonl", b'{"id": "a", "text": "x"}\n{"id": "b", "text": "caf\xe9"}\n')
        with pytest.raises(InputError, match=r"line 2: byte 0xe9 at offset 49 .*errors='replace'"):
            jsonl(path)
        assert jsonl(path, errors="replace")["b"].text == "caf\ufffd"

    def test_empty_absent_and_damaged(self, write, tmp_path):
        with pytest.raises(InputError, match="holds no documents"):
            jsonl(write("empty.jsonl", ""))
        with pytest.raises(InputError, match=r"no file .*none\.jsonl"):
            jsonl(tmp_path / "none.jsonl")
        with pytest.raises(InputError, match="is a folder"):
            jsonl(tmp_path)
        rows = [json.dumps({"id": str(n), "text": f"text {n * n}"}) for n in range(1000)]
        packed = gzip.compress("\n".join(rows).encode())
        with pytest.raises(InputError, match="damaged or cut off"):
            jsonl(write("cut.jsonl.gz", packed[: len(packed) // 2]))
        with pytest.raises(InputError, match="damaged or cut off"):
            jsonl(write("fake.jsonl.gz", b"plain"))


class TestTsv:
    def test_columns_by_number(self, write):
        assert tsv(write("two.tsv", 'a\tx "y\nb\tz\n')).texts == ('x "y', "z")
        corpus = tsv(write("three.tsv", "a\tTitle\ttext\n"))
        assert (corpus.titles, corpus.texts) == (("Title",), ("text",))

    def test_header(self, write):
        corpus = tsv(write("docs.tsv", "DocID\tlang\tText\na\ten\tx\n"))
        assert (corpus.ids, corpus.texts, corpus.metadata) == (("a",), ("x",), ({"lang": "en"},))

    def test_named_columns(self, write):
        path = write("docs.tsv", "x\ta\tu\n")
        assert tsv(path, columns=["text", "id", "url"])["a"].metadata == {"url": "u"}

    def test_bad_input(self, write):
        with pytest.raises(InputError, match="line 2: 3 tab-separated columns, expected 2"):
            tsv(write("docs.tsv", "a\tx\nb\ty\tz\n"))
        with pytest.raises(InputError, match="line 1: 4 tab-separated columns"):
            tsv(write("docs.tsv", "a\tb\tc\td\n"))
        with pytest.raises(InputError, match="line 1: 1 tab-separated columns"):
            tsv(write("docs.tsv", "a b\n"))
        with pytest.raises(InputError, match="line 3: document id 'a' occurs twice"):
            tsv(write("docs.tsv", "a\tx\n\na\ty\n"))
        with pytest.raises(InputError, match="expected different names with 'id' and 'text'"):
            tsv(write("docs.tsv", "a\tx\n"), columns=["id", "body"])
