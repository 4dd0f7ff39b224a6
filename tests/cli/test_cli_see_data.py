"""`fullrank see data`: files in, tables and a page out."""

import json

import pytest
from tiny_models import save_byte_language_model

transformers = pytest.importorskip("transformers")


def rows(count, seed=0):
    words = ["cat", "dog", "mat", "door", "sun"]
    return [
        {
            "instruction": f"Say something about the {words[(i + seed) % 5]}.",
            "output": " ".join(words[(i * k + seed) % 5] for k in range(6 + i)),
            "reward": i / 2,
        }
        for i in range(count)
    ]


def test_the_command(tmp_path, fullrank):
    save_byte_language_model(tmp_path / "model")
    (tmp_path / "a.json").write_text(json.dumps(rows(6)))
    lines = "".join(json.dumps(row) + "\n" for row in rows(6, seed=2))
    (tmp_path / "b.jsonl").write_text(lines)
    files = [str(tmp_path / "model"), str(tmp_path / "a.json"), str(tmp_path / "b.jsonl")]
    done = fullrank(
        "see", "data", *files, "--tokens", "16", "--html", str(tmp_path / "page.html"), "--out",
        str(tmp_path / "scores"),
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "effective rank" in " ".join(done.out.split())
    assert (tmp_path / "page.html").is_file()
    assert sorted(p.name for p in (tmp_path / "scores").iterdir()) == ["a.jsonl", "b.jsonl"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text(json.dumps(rows(6, seed=1)))
    same = [*files[:2], str(tmp_path / "other" / "a.json")]
    done = fullrank("see", "data", *same, "--tokens", "16", "--out", str(tmp_path / "scores"))
    assert done.code == 0, done.err
    assert (tmp_path / "scores" / "a-2.jsonl").is_file()
    alone = fullrank("see", "data", *files[:2], "--tokens", "0", "--ifd")
    assert alone.code == 0, alone.err
    assert "IFD" in alone.out
    assert "reward" in alone.out
    assert fullrank("see", "data", *files[:2], "--html", str(tmp_path / "no.html")).code == 2
