"""Readers of plain texts, and the corpus of Python sources."""

import json

import pytest

from fullrank.core.errors import InputError
from fullrank.datasets import python_source, read_texts
from fullrank.datasets.docstrings.duplicates import near_identical
from fullrank.datasets.texts import Texts


@pytest.fixture(scope="module")
def source():
    return python_source(["networkx"], size=600_000)


def test_python_source_has_three_parts_of_the_size_asked(source):
    sizes = {part: source.size(part) for part in source.parts}
    assert 0.8 * 600_000 < sum(sizes.values()) < 1.1 * 600_000
    assert sizes["train"] > 0.8 * sum(sizes.values())
    assert source.manifest["sha256"] == source.fingerprint
    assert set(source.manifest["packages"]) == {"networkx"}


def test_python_source_repeats_itself_and_depends_on_the_seed(source):
    assert python_source(["networkx"], size=600_000).fingerprint == source.fingerprint
    assert python_source(["networkx"], size=600_000, seed=1).fingerprint != source.fingerprint


def test_near_copies_are_in_one_part(source):
    files = [(part, text) for part, texts in source.parts.items() for text in texts]
    assert len({text for _, text in files}) == len(files)
    for a, b in near_identical([text for _, text in files]):
        assert files[a][0] == files[b][0]


def test_a_text_that_runs_on_is_cut_not_drawn_from():
    text = "".join(f"{i:04d} " for i in range(200))
    texts = Texts.divided("numbers", [text])
    assert "".join(texts.parts[part][0] for part in ("train", "dev", "test")) == text


def test_many_short_texts_are_held_out_whole():
    lines = [f"{'QA'[i % 2]}: the line number {i:04d}" for i in range(2000)]
    parts = Texts.divided("lines", ["", *lines]).parts
    assert [len(parts[part]) for part in ("train", "dev", "test")] == [1790, 105, 105]
    assert sorted(text for texts in parts.values() for text in texts) == sorted(lines)
    # Spread over all of the list, whatever takes turns in it.
    for part in ("dev", "test"):
        numbers = [int(text[-4:]) for text in parts[part]]
        assert {number // 100 for number in numbers} == set(range(20))
        assert abs(sum(number % 2 for number in numbers) - 52) < 2


def test_long_texts_among_short_ones_are_cut():
    book = "0123456789" * 1000
    parts = Texts.divided("mixed", [*["short"] * 30, book]).parts
    assert [texts[-1] for texts in parts.values()] == [book[:9000], book[9000:9500], book[9500:]]
    assert [len(texts) for texts in parts.values()] == [28, 3, 2]
    # Of few there is none to spare.
    few = Texts.divided("few", ["a short text of forty characters " * 2] * 18).parts
    assert [len(texts) for texts in few.values()] == [18, 18, 18]


def test_an_ending_may_be_in_capitals(tmp_path):
    line = json.dumps({"text": "a line " * 40})
    (tmp_path / "S.JSONL").write_text(line)
    assert "{" not in read_texts(tmp_path / "S.JSONL").parts["train"][0]
    assert read_texts(tmp_path).size("train") == read_texts(tmp_path / "S.JSONL").size("train")


def test_files_and_folders(tmp_path):
    lines = [json.dumps({"body": f"document {i} " * 20}) for i in range(3)]
    (tmp_path / "notes.jsonl").write_text("\n".join(lines))
    assert len(read_texts(tmp_path / "notes.jsonl", field_name="body").parts["train"]) == 3
    (tmp_path / "parts").mkdir()
    for part in ("train", "valid", "test"):
        (tmp_path / "parts" / f"{part}.txt").write_text(f"the {part} text")
    texts = read_texts(tmp_path / "parts")
    assert texts.parts == {
        "train": ("the train text",),
        "dev": ("the valid text",),
        "test": ("the test text",),
    }


def test_the_files_of_a_part_are_joined(tmp_path):
    for name in ("train.1.txt", "train.2.txt", "test.txt"):
        (tmp_path / name).write_text(f"the text of {name}")
    texts = read_texts(tmp_path)
    assert "train.1" in texts.parts["train"][0]
    assert "train.2" in texts.parts["train"][1]
    assert texts.parts["test"] == ("the text of test.txt",)


@pytest.mark.parametrize("names", [("dev.txt", "valid.txt"), ("train.jsonl", "train.txt")])
def test_two_files_for_one_part_are_refused(names, tmp_path):
    for name in {"train.txt", "test.txt", *names}:
        (tmp_path / name).write_text("some text")
    with pytest.raises(InputError, match=f"{names[0]} and .*{names[1]} are of one part"):
        read_texts(tmp_path)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda p: None, "no texts at"),
        (lambda p: p.write_bytes(b"\xff\xfe bad"), "no UTF-8"),
        (lambda p: p.write_text(""), "is empty"),
    ],
)
def test_what_cannot_be_read(tmp_path, write, message):
    path = tmp_path / "notes.txt"
    write(path)
    with pytest.raises(InputError, match=message):
        read_texts(path)


def test_a_line_of_jsonl_ends_where_the_file_says(tmp_path):
    # A JSON string may hold these as they are; str.splitlines takes them for line ends.
    text = "one\u2028two\u0085three " * 20
    path = tmp_path / "notes.jsonl"
    line = json.dumps({"text": text}, ensure_ascii=False)
    path.write_text(f"\ufeff{line}\n", encoding="utf-8")
    parts = read_texts(path).parts
    assert "".join(parts[part][0] for part in ("train", "dev", "test")) == text


@pytest.mark.parametrize(
    ("value", "message"),
    [("null", "null, not text"), ("7", "a int, not text"), (r'"a\ud83d"', "surrogate")],
)
def test_what_is_no_text_is_not_made_one(tmp_path, value, message):
    path = tmp_path / "notes.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{{"text": {value}}}\n')
    with pytest.raises(InputError, match=f"line 2: .*{message}"):
        read_texts(path)


def test_a_test_part_is_never_trained_on(tmp_path):
    for part in ("train", "test"):
        (tmp_path / f"{part}.txt").write_text(f"the {part} text " * 20)
    parts = read_texts(tmp_path).parts
    assert parts["test"] == ("the test text " * 20,)
    assert "test" not in parts["train"][0] + parts["dev"][0]


def test_a_train_file_alone_is_one_of_many(tmp_path):
    for name in ("model", "train"):
        (tmp_path / f"{name}.py").write_text(f"# {name}\n" * 20)
    assert len(read_texts(tmp_path).parts["train"]) == 2


def test_what_is_hidden_or_no_file_is_passed_over(tmp_path):
    (tmp_path / "notes.md").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "hidden.md").write_text("hidden " * 40)
    (tmp_path / "notes.md" / "one.md").write_text("shown " * 40)
    assert len(read_texts(tmp_path).parts["train"]) == 1


@pytest.mark.parametrize("name", ["tinyshakespeare", "wikitext-2", "gsm8k"])
def test_a_collection_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.setenv("FULLRANK_DATA", str(tmp_path))
    with pytest.raises(InputError, match=r"wikitext-2|gsm8k|tinyshakespeare"):
        read_texts(name)


def test_jsonl_errors_name_the_line(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text('{"text": "a"}\n{"other": "b"}\n')
    with pytest.raises(InputError, match="line 2"):
        read_texts(path)


def test_settings_that_make_no_sense():
    with pytest.raises(InputError, match="size"):
        python_source(size=10)
    with pytest.raises(InputError, match="no package"):
        python_source(["no-such-package"])


@pytest.mark.data
@pytest.mark.parametrize("name", ["tinyshakespeare", "wikitext-2", "gsm8k"])
def test_collections(name, data_folder):
    texts = read_texts(name)
    assert set(texts.parts) == {"train", "dev", "test"}
    assert texts.size("train") > 5 * texts.size("dev")


def test_collections_need_their_folder(monkeypatch):
    monkeypatch.delenv("FULLRANK_DATA", raising=False)
    with pytest.raises(InputError, match="FULLRANK_DATA"):
        read_texts("tinyshakespeare")
