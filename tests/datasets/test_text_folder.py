import pytest

from fullrank.core import InputError
from fullrank.datasets import text_folder
from fullrank.datasets.text_folder import first_heading


def test_reads_text_and_passes_over_the_rest(tmp_path):
    (tmp_path / "sub dir").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_text("plain words")
    (tmp_path / "sub dir" / "My notes.md").write_text("intro\n\n## Second *level* ##\ntext\n")
    (tmp_path / ".hidden" / "b.txt").write_text("hidden")
    (tmp_path / ".c.txt").write_text("hidden")
    (tmp_path / "binary.txt").write_bytes(b"PK\0\1")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "code.py").write_text("x = 1")
    corpus = text_folder(tmp_path)
    assert corpus.ids == ("a.txt", "sub_dir/My_notes.md")
    assert corpus.titles == ("a", "Second *level*")
    assert corpus.metadata[1] == {"path": "sub dir/My notes.md"}
    assert "code.py" in text_folder(tmp_path, suffixes=None)
    assert text_folder(tmp_path / "a.txt").ids == ("a.txt",)


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("# One\n# Two", "One"),
        ("Setext\n===\n", "Setext"),
        ("####### seven", ""),
        ("#hashtag", ""),
        ("```\n# a comment\n```\n# Real", "Real"),
        ("---\ntitle: 'Quoted'\ntags: x\n---\n# Other", "Quoted"),
        ("---\ntags: x\n---\n# Other", "Other"),
        ("words\n\n----\n\nmore", ""),
        ("", ""),
    ],
)
def test_first_heading(text, title):
    assert first_heading(text) == title


def test_other_bytes_are_located(tmp_path):
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbffine\nfine\nna\xefve\n")
    with pytest.raises(InputError, match=r"a\.md, line 3: byte 0xef at offset 15 "):
        text_folder(tmp_path)
    assert text_folder(tmp_path, errors="replace").texts == ("fine\nfine\nna\ufffdve\n",)


def test_ids_that_fall_together(tmp_path):
    (tmp_path / "a b.txt").write_text("x")
    (tmp_path / "a_b.txt").write_text("y")
    with pytest.raises(InputError, match=r"a_b\.txt: .*occurs twice, first in .*a b\.txt"):
        text_folder(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(InputError, match="holds no documents"):
        text_folder(tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        text_folder(tmp_path / "none")


def test_a_file_of_a_megabyte(tmp_path):
    (tmp_path / "big.txt").write_text("word " * 200_000)
    assert len(text_folder(tmp_path)["big.txt"].text) == 1_000_000
