"""The leaderboard from beginning to end: made, gone on with, shown; bad input."""

import json

import pytest
from typer.testing import CliRunner

from fullrank.bench import Size, bench_optimizers, lm_jobs
from fullrank.bench import optimizers as module
from fullrank.cli.bench import app
from fullrank.core import InputError

MICRO = Size(
    "micro", 16, 1, 2, context=16, batch=2, steps=4, evaluations=1, dev_bytes=2048, rates=2, seeds=2
)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    return str(path)


def test_made_then_gone_on_with(text, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_jobs, "GAP", 4)
    out = tmp_path / "bench"
    options = {"size": MICRO, "texts": [text], "workers": 1, "progress": False}
    first = bench_optimizers(out, optimizers=["AdamW"], **options)
    (row,) = first.rows["words"]
    assert row.lr in (0.0003, 0.001)
    assert row.note == "edge"
    assert (row.seeds, row.steps, row.tokens) == (2, 4, 4 * 2 * 16)
    assert row.spread > 0
    assert row.steps_to_baseline == 4
    assert row.step_ms > 0
    kinds = [json.loads(line)["kind"] for line in (out / "runs.jsonl").read_text().splitlines()]
    assert sorted(kinds) == ["memory", "time", "train", "train", "train"]
    assert "0.00" in (out / "leaderboard.md").read_text()
    assert json.loads((out / "leaderboard.json").read_text())["rows"]["words"]
    pytest.importorskip("matplotlib")
    assert "AdamW" in (out / "words.svg").read_text()

    # All is there already: the work is never asked for.
    monkeypatch.setattr(lm_jobs, "work", None)
    again = bench_optimizers(out, optimizers=["AdamW"], **options)
    assert again.rows == first.rows


def test_bad_input_is_found_before_anything_is_run(text, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_jobs", None)
    out = tmp_path / "bench"
    for message, options in [
        ("no optimizer 'Adam'", {"optimizers": ["Adam"]}),
        ("no texts at", {"texts": ["./nothing"]}),
        ("two texts are named words", {"texts": [text, text]}),
        ("device 'tpu'", {"device": "tpu"}),
        ("size 'huge'", {"size": "huge"}),
    ]:
        with pytest.raises(InputError, match=message):
            bench_optimizers(out, **{"texts": [text], **options})
        assert not out.exists()


def test_the_command_hands_everything_on(monkeypatch, text, tmp_path):
    seen = {}

    def instead(out, **options):
        seen.update(options, out=out)
        rows = {"words": []}
        return module.Leaderboard(options["size"], rows, {"words": {}})

    monkeypatch.setattr(module, "bench_optimizers", instead)
    arguments = ["optimizers", "--size", "tiny", "--text", text, "--optimizer", "Muon"]
    out = ["--out", tmp_path / "x", "--seeds", 2, "--rates", 5, "--workers", 3, "--remeasure"]
    result = CliRunner().invoke(app, [*arguments, *map(str, out)])
    assert result.exit_code == 0, result.output
    size = seen.pop("size")
    assert (size.name, size.rates, size.seeds) == ("tiny", 5, 2)
    assert seen == {
        "out": tmp_path / "x",
        "texts": [text],
        "optimizers": ["Muon"],
        "workers": 3,
        "threads": 1,
        "device": "cpu",
        "remeasure": True,
    }


def test_help_comes_without_torch():
    result = CliRunner().invoke(app, ["optimizers", "--help"])
    assert result.exit_code == 0
    assert "--remeasure" in result.output
