"""Collections from Hugging Face and ir_datasets, without a network."""

import pytest

from fullrank.core import InputError
from fullrank.datasets import from_huggingface, from_ir_datasets

hf = pytest.importorskip("datasets")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_table_of_documents():
    table = hf.Dataset.from_dict(
        {"id": [7, 8], "text": ["x", "y"], "title": ["T", None], "n": [1, 2]}
    )
    data = from_huggingface(table)
    assert data.corpus.ids == ("7", "8")
    assert data.corpus.titles == ("T", "")
    assert data.corpus["8"].metadata == {"n": 2}
    assert data.queries == {}
    assert from_huggingface(table, limit=1).corpus.ids == ("7",)
    with pytest.raises(InputError, match="no documents"):
        from_huggingface(table, limit=-1)


def test_table_without_ids_and_with_other_columns():
    table = hf.Dataset.from_dict({"body": ["x", "y"]})
    assert from_huggingface(table, text_column="body").corpus.ids == ("0", "1")
    with pytest.raises(InputError, match="no column 'text'; it has body"):
        from_huggingface(table)
    with pytest.raises(InputError, match="no column 'key'"):
        from_huggingface(table, text_column="body", id_column="key")


def test_local_retrieval_collection(tmp_path, cache):
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "corpus.jsonl").write_text('{"_id": "d1", "title": "T", "text": "x"}\n')
    (folder / "queries.jsonl").write_text(
        '{"_id": "q1", "text": "what"}\n{"_id": "q2", "text": "unjudged"}\n'
    )
    (folder / "test.jsonl").write_text('{"query-id": "q1", "corpus-id": "d1", "score": 1.0}\n')
    (folder / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: corpus\n  data_files:\n  - split: corpus\n    path: corpus.jsonl\n"
        "- config_name: queries\n  data_files:\n  - split: queries\n    path: queries.jsonl\n"
        "- config_name: default\n  data_files:\n  - split: test\n    path: test.jsonl\n---\n"
    )
    data = from_huggingface(folder)
    assert data.corpus["d1"].contents == "T\nx"
    assert data.queries == {"q1": "what"}
    assert data.qrels == {"q1": {"d1": 1}}
    with pytest.raises(InputError, match="split 'dev'"):
        from_huggingface(folder, split="dev")
    assert from_huggingface(folder, config="corpus", split="corpus").corpus.ids == ("d1",)


def test_unknown_name(tmp_path, cache):
    with pytest.raises(InputError, match="no Hugging Face data set"):
        from_huggingface(tmp_path / "none")


def test_ir_datasets(tmp_path):
    library = pytest.importorskip("ir_datasets")
    docs, queries, qrels = (tmp_path / name for name in ("docs.tsv", "queries.tsv", "qrels"))
    docs.write_text("d1\tfirst\nd2\tsecond\n")
    queries.write_text("q1\twhat\nq2\tunjudged\n")
    qrels.write_text("q1 0 d2 1\n")
    source = library.create_dataset(str(docs), str(queries), str(qrels))
    data = from_ir_datasets(source)
    assert data.corpus.ids == ("d1", "d2")
    assert data.corpus["d2"].text == "second"
    assert data.queries == {"q1": "what"}
    assert data.qrels == {"q1": {"d2": 1}}


def test_unknown_ir_datasets_id():
    pytest.importorskip("ir_datasets")
    with pytest.raises(InputError, match="knows no data set 'no-such-thing'"):
        from_ir_datasets("no-such-thing")
