"""BEIR folders, TREC collections, queries and judgements."""

import gzip

import pytest

from fullrank.core import InputError
from fullrank.datasets import (
    beir,
    cranfield,
    read_qrels,
    read_queries,
    read_topics,
    trec,
    trec_documents,
    vaswani,
)
from fullrank.datasets.judgements import collect_qrels


@pytest.fixture
def beir_folder(tmp_path):
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text(
        '{"_id": "d1", "title": "One", "text": "x", "metadata": {}}\n'
        '{"_id": "d2", "title": "", "text": "y"}\n'
    )
    (tmp_path / "queries.jsonl").write_text(
        '{"_id": "q1", "text": "first"}\n{"_id": "q2", "text": "second"}\n'
    )
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td1\t1\n")
    return tmp_path


class TestBeir:
    def test_reads_judged_queries(self, beir_folder):
        data = beir(beir_folder)
        assert data.queries == {"q2": "second"}
        assert data.qrels == {"q2": {"d1": 1}}
        assert data.corpus["d1"].title == "One"
        assert data.name == beir_folder.name

    def test_a_query_without_text_matters_only_where_it_is_judged(self, beir_folder):
        queries = beir_folder / "queries.jsonl"
        queries.write_text('{"_id": "q1", "text": ""}\n{"_id": "q2", "text": "second"}\n')
        assert beir(beir_folder).queries == {"q2": "second"}
        queries.write_text('{"_id": "q2", "text": ""}\n')
        with pytest.raises(InputError, match="query 'q2' has no text"):
            beir(beir_folder)

    def test_compressed(self, beir_folder):
        for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
            path = beir_folder / name
            path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
        assert beir(beir_folder).qrels == {"q2": {"d1": 1}}

    def test_bad_folders(self, beir_folder):
        with pytest.raises(InputError, match="split 'dev'; there are test"):
            beir(beir_folder, "dev")
        (beir_folder / "qrels" / "dev.tsv").write_text("q9\td1\t1\n")
        with pytest.raises(InputError, match=r"not in queries\.jsonl, e.g. 'q9'"):
            beir(beir_folder, "dev")
        with pytest.raises(InputError, match="no BEIR folder"):
            beir(beir_folder / "qrels")
        with pytest.raises(InputError, match="there is no folder"):
            beir(beir_folder / "none")


class TestQrels:
    def test_forms(self, tmp_path):
        path = tmp_path / "qrels"
        path.write_text("1 0 d1 2\n1\t0\td2\t0\n\n2 Q0 d1 -1\n")
        assert read_qrels(path) == {"1": {"d1": 2, "d2": 0}, "2": {"d1": -1}}
        path.write_text("q1\td1\t1\nq1\td1\t1\n")
        assert read_qrels(path) == {"q1": {"d1": 1}}
        path.write_text("q1 d1 1.0\n")
        assert read_qrels(path) == {"q1": {"d1": 1}}

    @pytest.mark.parametrize("grade", [0.5, float("nan"), float("inf"), None, "1"])
    def test_grades_of_a_library(self, grade):
        assert collect_qrels([("q", "d", 1.0)], "there") == {"q": {"d": 1}}
        with pytest.raises(InputError, match="there: the grade"):
            collect_qrels([("q", "d", grade)], "there")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1 0 d1 1\n1 d1\n", "line 2: expected 'qid 0 docid grade'"),
            ("1 0 d1 1\n1 0 d2 high\n", "line 2: the grade 'high'"),
            ("1 0 d1 0.5\n", "line 1: the grade '0.5'"),
            ("1 0 d1 1\n1 0 d1 2\n", "line 2: document 'd1' is judged 2 .* but 1"),
            ("", "holds no judgements"),
        ],
    )
    def test_bad_lines(self, tmp_path, text, message):
        path = tmp_path / "qrels"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_qrels(path)


class TestQueries:
    @pytest.mark.parametrize(
        "text",
        [
            '{"_id": "1", "text": "flow"}\n{"id": 2, "text": " heat "}\n',
            "1\tflow\n\n2\theat\n",
            "flow\nheat\n",
            "<top><num>1</num><title>flow</title></top><top><num>2<title>heat\n</top>",
            '{"query_id": 1, "text": "flow"}\n{"qid": "2", "query": "heat", "doc_id": 3}\n',
            "\nID\ttext\n1\tflow\n\n2\theat\n",
            "kind\tqid\tquery\nx\t1\tflow\nx\t2\theat\n",
        ],
    )
    def test_forms(self, tmp_path, text):
        path = tmp_path / "queries"
        path.write_text(text)
        assert read_queries(path) == {"1": "flow", "2": "heat"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("1\tflow\n1\theat\n", "line 2: query id '1' occurs twice"),
            ("1\tflow\n2\t \n", "line 2: query '2' has no text"),
            ("1\tflow\nheat\n", "line 2: expected an id, a tab"),
            ("a b\tflow\n", "line 1: query id 'a b'"),
            ('{"text": "flow"}\n', r"line 1: none of the keys .* is the id of a query \([^=]*\)$"),
            ("id\ttext\n1\tflow\tmore\n", r"line 2: 3 tab-separated columns, expected 2"),
            ("id\ttext\n", "holds no queries"),
            ('{"id": "1"}\n', "line 1: query '1' has no text"),
            ("", "holds no queries"),
        ],
    )
    def test_bad_lines(self, tmp_path, text, message):
        path = tmp_path / "queries"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_queries(path)

    def test_a_query_of_100_kilobytes(self, tmp_path):
        path = tmp_path / "queries.tsv"
        path.write_text("1\t" + "flow " * 20_000)
        assert len(read_queries(path)["1"]) == 99_999


CLASSIC = """
<top>
<num> Number: 301
<title> Topic: Organized
 Crime &amp; law

<desc> Description:
Identify organizations.

<narr> Narrative: Long: text.
</top>
"""


class TestTopics:
    def test_classic_form_and_fields(self, tmp_path):
        path = tmp_path / "topics"
        path.write_text(CLASSIC)
        assert read_topics(path) == {"301": "Organized Crime & law"}
        assert read_topics(path, field="desc") == {"301": "Identify organizations."}
        assert read_topics(path, field="NARR") == {"301": "Long: text."}
        with pytest.raises(InputError, match=r"no text in <question>.*'title'"):
            read_topics(path, field="question")

    def test_xml_forms(self, tmp_path):
        path = tmp_path / "topics.xml"
        path.write_text(
            '<?xml version="1.0"?><topics task="x">\n<topic number="1"><query>viral</query>\n'
            "<question>what</question></topic><topic id='2' type=\"a\">\n<title>two</title></topic>"
            "</topics>"
        )
        assert read_topics(path) == {"1": "viral", "2": "two"}

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("<top>\n<title>x</title>\n</top>", "line 1: a topic without a <num>"),
            ("\n<top>\n<num>1</num>", "line 2: this topic is not closed"),
            (
                "<top><num>1<title>x</top>\n<top><num>1<title>y</top>",
                "line 2: topic 1 occurs twice",
            ),
            ("<html></html>", "holds no topics"),
        ],
    )
    def test_bad_topics(self, tmp_path, text, message):
        path = tmp_path / "topics"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_topics(path)


class TestTrec:
    def test_documents(self, tmp_path):
        (tmp_path / "b.gz").write_bytes(
            gzip.compress(b"<doc><docno>3</docno>\nplain <b>body</b> text</doc>")
        )
        (tmp_path / "a").write_text(
            "<DOC>\n<DOCNO> A-1 </DOCNO>\n<HEADLINE>A\nhead</HEADLINE><BYLINE>me</BYLINE>\n"
            "<TEXT>\n<P>one</P>\n</TEXT><TEXT>two &lt;3</TEXT>\n</DOC><DOC>\n<DOCNO>2</DOCNO>\n"
            "</DOC>\n"
        )
        corpus = trec_documents(tmp_path)
        assert corpus.ids == ("A-1", "2", "3")
        assert corpus["A-1"].title == "A head"
        assert corpus["A-1"].text.split() == ["one", "two", "<3"]
        assert corpus["2"].text == ""
        assert corpus["3"].text.split() == ["plain", "body", "text"]

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("<DOC>\nx\n</DOC>", "line 1: a <DOC> without <DOCNO>"),
            ("\n<DOC>\n<DOCNO>1</DOCNO>", "line 2: this <DOC> has no </DOC>"),
            ("<DOC>\n<DOCNO>1</DOCNO>\n<DOC>\n", "line 3: a <DOC> inside the one of line 1"),
            ("<DOC><DOCNO>1 2</DOCNO></DOC>", "line 1: document id '1 2'"),
            ("<DOC><DOCNO>1</DOCNO></DOC>\n" * 2, "line 2: document id '1' occurs twice"),
            ("words", "holds no documents"),
        ],
    )
    def test_bad_documents(self, tmp_path, text, message):
        path = tmp_path / "docs"
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            trec_documents(path)

    def test_collection(self, tmp_path):
        (tmp_path / "docs").write_text("<DOC><DOCNO>1</DOCNO><TEXT>crime</TEXT></DOC>")
        (tmp_path / "topics").write_text(CLASSIC)
        (tmp_path / "qrels").write_text("301 0 1 1\n302 0 1 1\n")
        files = tmp_path / "docs", tmp_path / "topics", tmp_path / "qrels"
        data = trec(*files, field="desc")
        assert data.queries == {"301": "Identify organizations."}
        assert data.qrels == {"301": {"1": 1}}
        (tmp_path / "qrels").write_text("1 0 1 1\n")
        with pytest.raises(InputError, match=r"judges none of the topics .*'1'.*'301'"):
            trec(*files)
        with pytest.raises(InputError, match="no file"):
            trec_documents(tmp_path / "none")
        (tmp_path / "void").mkdir()
        with pytest.raises(InputError, match="is empty"):
            trec_documents(tmp_path / "void")

    def test_a_long_document_takes_time_in_proportion(self, tmp_path):
        body = "short line of text\n" * 60_000
        (tmp_path / "docs").write_text(f"<DOC>\n<DOCNO>1</DOCNO>\n<TEXT>\n{body}</TEXT>\n</DOC>\n")
        assert len(trec_documents(tmp_path / "docs")["1"].text) > 1_000_000


class TestBuiltin:
    @pytest.mark.data
    def test_vaswani(self, data_folder):
        data = vaswani(data_folder / "vaswani")
        assert (len(data.corpus), len(data.queries)) == (11_429, 93)
        assert sum(map(len, data.qrels.values())) == 2_083
        assert data.queries["4"] == "SYSTEMS OF DATA CODING FOR INFORMATION TRANSFER"
        assert all(d in data.corpus for judged in data.qrels.values() for d in judged)

    @pytest.mark.data
    def test_cranfield_numbers_queries_by_order(self, data_folder):
        data = cranfield(data_folder / "cranfield")
        assert (len(data.corpus), len(data.queries)) == (1_400, 225)
        assert list(data.queries) == [str(n) for n in range(1, 226)]
        # The third query is numbered 4 in the file.
        assert data.queries["3"].startswith("what problems of heat conduction in composite slabs")
        assert "composite" in data.corpus["5"].text
        assert data.qrels["3"]["5"] == 1
        assert all(d in data.corpus for judged in data.qrels.values() for d in judged)

    def test_folder_from_the_environment(self, monkeypatch, tmp_path):
        monkeypatch.delenv("FULLRANK_DATA", raising=False)
        with pytest.raises(InputError, match="FULLRANK_DATA"):
            vaswani()
        monkeypatch.setenv("FULLRANK_DATA", str(tmp_path))
        with pytest.raises(InputError, match=r"cranfield lacks cran\.all\.1400\.xml"):
            cranfield()
