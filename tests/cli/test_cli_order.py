"""`fullrank order` on files: index, search, evaluate, and bad input."""

import json

import pytest
from tiny_models import cross_encoder

from fullrank.core import Corpus, Run

TEXTS = {
    "apple": "Apples are fruit that grow on trees.",
    "pear": "Pears are fruit too, and softer than apples.",
    "matrix": "A matrix has rows, columns and a rank.",
    "svd": "The singular value decomposition of a matrix.",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    lines = [json.dumps({"id": i, "text": t, "kind": i[0]}) for i, t in TEXTS.items()]
    (folder / "docs.jsonl").write_text("\n".join(lines))
    (folder / "queries.tsv").write_text("q1\tfruit on trees\nq2\tdecompose a matrix\n")
    (folder / "qrels.txt").write_text("q1 0 apple 1\nq2 0 svd 1\n")
    return folder


@pytest.fixture(scope="module")
def index(files):
    from fullrank.datasets import jsonl
    from fullrank.retrieval import Index

    Index.create(files / "docs.index", jsonl(files / "docs.jsonl"), None, progress=False)
    return files / "docs.index"


def test_index_search_evaluate(fullrank, files, tmp_path):
    made = fullrank("order", "index", files / "docs.jsonl", "--out", tmp_path / "i")
    assert made.code == 0, made
    assert "4 documents" in " ".join(made.out.split())
    shown = fullrank("order", "search", tmp_path / "i", "decomposition of matrices", "-k", 2)
    assert shown.code == 0, shown
    assert "svd" in shown.out
    for system in ("bm25", "dense"):
        run = tmp_path / f"{system}.run"
        found = fullrank(
            "order", "search", tmp_path / "i", "--queries", files / "queries.tsv",
            "--system", system, "--out", run,
        )  # fmt: skip
        assert found.code == 0, found
    one = fullrank("order", "evaluate", tmp_path / "dense.run", files / "qrels.txt")
    assert one.code == 0, one
    assert "nDCG@10" in one.out
    both = fullrank(
        "order", "evaluate", tmp_path / "bm25.run", tmp_path / "dense.run", files / "qrels.txt",
        "--metric", "RR", "--markdown", "--per-query", tmp_path / "each.tsv",
    )  # fmt: skip
    assert both.code == 0, both
    assert "| dense |" in both.out
    assert len((tmp_path / "each.tsv").read_text().splitlines()) == 5


def test_documents_are_added(fullrank, files, tmp_path):
    from fullrank.datasets import jsonl
    from fullrank.retrieval import Index

    Index.create(tmp_path / "i", jsonl(files / "docs.jsonl"), None, progress=False)
    (tmp_path / "more.jsonl").write_text(json.dumps({"id": "plum", "text": "A plum is small."}))
    added = fullrank("order", "index", tmp_path / "more.jsonl", "--out", tmp_path / "i", "--add")
    assert added.code == 0, added
    assert "5 documents" in " ".join(added.out.split())
    assert "plum" in fullrank("order", "search", tmp_path / "i", "plum").out


def test_what_became_of_documents_is_said(fullrank, files, tmp_path):
    def indexed(*given):
        arguments = ["--out", tmp_path / "i[/x]", *given]
        return fullrank("order", "index", tmp_path / "docs.jsonl", *arguments)

    def write(**texts):
        lines = [json.dumps({"id": i, "text": t}) for i, t in texts.items()]
        (tmp_path / "docs.jsonl").write_text("\n".join(lines))

    write(a="An apple.", b="A pear.", c="A plum.")
    first = indexed()
    assert first.code == 0, first
    assert f"{tmp_path / 'i[/x]'}: 3 documents" in first.out
    assert "what was there" not in first.out
    write(b="A pear.", c="A plum is small.", d="A quince.", e="A fig.")
    refused = indexed("--add")
    assert (refused.code, "without --add" in refused.err) == (2, True)
    again = indexed()
    assert "what was there: 2 new, 1 with another text, 1 gone" in again.out


def test_reranking_looks_at_as_many_as_it_is_told(fullrank, files, tmp_path):
    model = cross_encoder(tmp_path / "model")
    lines = [json.dumps({"id": f"d{i}", "text": f"rank {i}"}) for i in range(130)]
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    (tmp_path / "queries.tsv").write_text("q\trank\n")
    run = [f"q Q0 d{i} {i + 1} {200 - i} a\n" for i in range(130)]
    (tmp_path / "a.run").write_text("".join(run))

    def reranked(depth):
        out = tmp_path / f"{depth}.run"
        done = fullrank(
            "order", "rerank", tmp_path / "a.run", tmp_path / "docs.jsonl",
            tmp_path / "queries.tsv", "--model", model, "--out", out, "--depth", depth,
        )  # fmt: skip
        assert done.code == 0, done
        return Run.from_trec(out)["q"].ids.tolist()

    ids = [f"d{i}" for i in range(130)]
    assert reranked(2)[2:] == ids[2:]
    assert reranked(130)[120:] != ids[120:]


def test_a_run_of_many_queries_is_deep_enough_to_be_measured(fullrank, tmp_path):
    from fullrank.retrieval import Index

    corpus = Corpus([f"d{i}" for i in range(120)], [f"rank {i}" for i in range(120)])
    Index.create(tmp_path / "i", corpus, None, progress=False)
    (tmp_path / "queries.tsv").write_text("q\trank\n")

    def found(*arguments):
        done = fullrank("order", "search", tmp_path / "i", *arguments, "--out", tmp_path / "a.run")
        assert done.code == 0, done
        return len(Run.from_trec(tmp_path / "a.run")["q"])

    many = ("--queries", tmp_path / "queries.tsv")
    assert (found(*many), found(*many, "-k", 7), found("rank")) == (100, 7, 10)


def test_filters(fullrank, index):
    shown = fullrank("order", "search", index, "fruit matrix", "--where", "kind=m")
    assert shown.code == 0, shown
    assert "matrix" in shown.out
    assert "apple" not in shown.out
    assert "apple" in fullrank("order", "search", index, "fruit", "--where", "kind!=m").out


def test_runs_of_other_collections_and_runs_given_twice_are_told(fullrank, files, tmp_path):
    run, qrels = tmp_path / "a.run", tmp_path / "other.txt"
    run.write_text("q1 Q0 apple 1 1.0 a\n")
    found = fullrank("order", "evaluate", run, run, files / "qrels.txt")
    assert (found.code, f"{run} is given twice" in found.err) == (2, True)
    qrels.write_text("1 0 d1 1\n")
    found = fullrank("order", "evaluate", run, qrels)
    assert (found.code, "no query in common (e.g. 'q1' and '1')" in found.err) == (2, True)
    qrels.write_text("q1 0 d1 1\n")
    found = fullrank("order", "evaluate", run, qrels)
    assert found.code == 0
    assert found.err.startswith(f"warning: {run} ranks no document that {qrels} judges")


def test_what_to_type_next_is_quoted(fullrank, files, tmp_path):
    made = fullrank("order", "index", files / "docs.jsonl", "--out", tmp_path / "my notes")
    assert f"search '{tmp_path / 'my notes'}'" in " ".join(made.out.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["search", "{index}"], "either a query or --queries"),
        (["search", "{index}", ""], "the query is empty"),
        (["search", "{index}", "x", "--system", "magic"], "no system 'magic'"),
        (["search", "{index}", "x", "--where", "kind"], "is no comparison"),
        (["search", "{files}", "x"], "no fullrank index"),
        (["search", "{files}/absent", "x"], "absent"),
        (["index", "{files}/absent.jsonl"], "absent.jsonl"),
        (["index", "{files}/empty.jsonl"], "empty"),
        (["index", "{files}/docs.jsonl", "--out", "{files}"], "{files}"),
        (["index", "{files}/docs.jsonl", "--encoder", "a", "--encoder", "b"], "named 'dense'"),
        (["index", "{files}/docs.jsonl", "--out", "{index}", "--add", "--encoder", "a"], "leave"),
        (["evaluate", "{files}/qrels.txt"], "a run file and a qrels file"),
        (["evaluate", "a.run", "{files}/qrels.txt", "--baseline", "a"], "two runs or more"),
        (["evaluate", "{files}/docs.jsonl", "{files}/qrels.txt"], "expected 'qid Q0 docid"),
    ],
)
def test_bad_input_is_one_clear_line(fullrank, files, index, arguments, said):
    (files / "empty.jsonl").write_text("")
    given = [a.format(index=index, files=files) for a in arguments]
    found = fullrank("order", *given)
    assert found.code == 2, found
    assert said.format(files=files) in found.err
    assert "Traceback" not in found.err


def test_a_model_that_is_not_there_is_said_before_documents_are_read(
    fullrank, tmp_path, monkeypatch
):
    monkeypatch.setattr("fullrank.datasets.read_corpus", None)  # would be a bug's message
    found = fullrank("order", "index", "pydocs", "--out", tmp_path / "i", "--encoder", "a=./absent")
    assert found.code == 2, found
    assert "no model at './absent'" in found.err
    assert not (tmp_path / "i").exists()


def test_a_damaged_index_is_said_to_be_damaged(fullrank, files, tmp_path):
    from fullrank.datasets import jsonl
    from fullrank.retrieval import Index

    Index.create(tmp_path / "i", jsonl(files / "docs.jsonl"), None, progress=False)
    victim = next((tmp_path / "i").rglob("data.npy"))
    victim.write_bytes(victim.read_bytes()[:-8])
    found = fullrank("order", "search", tmp_path / "i", "fruit")
    assert found.code == 2, found
    assert "damaged" in found.err
