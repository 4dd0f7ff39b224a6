"""`fullrank train encoder`: a BEIR folder in, a model out; bad input."""

import json
import random

import pytest
from typer.testing import CliRunner

from fullrank.cli.train import app
from fullrank.core import InputError

WORDS = [a + b for a in "bcdfghkl" for b in ("ab", "el", "in", "ot", "um", "ay")]


@pytest.fixture
def encoder(tiny_encoder):
    return tiny_encoder(*WORDS)


@pytest.fixture
def beir(tmp_path):
    draw = random.Random(0)
    folder = tmp_path / "data"
    (folder / "qrels").mkdir(parents=True)
    documents = [
        {"_id": f"d{i}", "title": "", "text": " ".join(draw.choices(WORDS, k=6))} for i in range(60)
    ]
    queries = [
        {"_id": f"q{i}", "text": " ".join(documents[i]["text"].split()[:3])} for i in range(40)
    ]
    for name, rows in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, numbers in (("train", range(30)), ("dev", range(30, 36)), ("test", range(36, 40))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i}\t1" for i in numbers)]
        (folder / "qrels" / f"{name}.tsv").write_text("\n".join(lines))
    return folder


def run(*arguments):
    # `fullrank` itself turns these errors into a line and an exit code.
    result = CliRunner().invoke(app, ["encoder", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_trains_on_the_train_part_and_measures_on_dev(encoder, beir, tmp_path):
    from sentence_transformers import SentenceTransformer

    out = tmp_path / "out"
    options = ["--model", encoder, "--out", out, "--seconds", 0, "--max-steps", 4, "--patience", 0]
    result = run(beir, *options, "--rank", 4, "--batch-size", 8)
    assert result.exit_code == 0
    assert "nDCG@10" in result.output
    assert "galore_adamw (measured)" in result.output
    assert SentenceTransformer(str(out), device="cpu").encode(["bab"]).shape == (1, 32)
    facts = json.loads((out / "training.json").read_text())
    assert facts["data"]["pairs"] == 30
    assert facts["data"]["dev_queries"] == 6
    assert facts["config"]["seconds"] is None
    assert facts["config"]["rank"] == 4
    assert len(facts["history"]["steps"]) == 4


def test_judgements_without_dev_hold_some_out(encoder, beir, tmp_path):
    (beir / "qrels" / "dev.tsv").unlink()
    out = tmp_path / "out"
    result = run(beir, "--model", encoder, "--out", out, "--max-steps", 2, "--optimizer", "adamw")
    assert result.exit_code == 0
    facts = json.loads((out / "training.json").read_text())
    assert (facts["data"]["pairs"], facts["data"]["dev_queries"]) == (27, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "sgd"], "optimizer 'sgd'"),
        (["--optimizer", "adamw", "--rank", 4], "--rank"),
        (["--lr", -1], "lr is -1"),
        (["--model", "./nowhere"], "no model"),
        (["--metric", "quality"], "quality"),
    ],
)
def test_bad_options(encoder, beir, tmp_path, options, message):
    base = [] if "--model" in options else ["--model", encoder]
    with pytest.raises(InputError, match=message):
        run(beir, "--out", tmp_path / "out", *base, *options)


def test_bad_data(encoder, tmp_path):
    with pytest.raises(InputError, match="no collection"):
        run(tmp_path / "nothing", "--model", encoder, "--out", tmp_path / "out")


def test_a_model_that_is_not_there_is_said_before_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("fullrank.datasets.read_dataset", None)  # would be a TypeError
    with pytest.raises(InputError, match="no model at"):
        run("pydocs", "--out", tmp_path / "out", "--model", tmp_path / "absent")
    assert not (tmp_path / "out").exists()


def test_help_comes_without_torch():
    result = CliRunner().invoke(app, ["encoder", "--help"])
    assert result.exit_code == 0
    assert "--seconds" in result.output


def test_select_by_rankme_keeps_those_weights_and_says_its_limits(encoder, beir, tmp_path):
    out = tmp_path / "out"
    options = ["--model", encoder, "--out", out, "--seconds", 0, "--max-steps", 4, "--patience", 0]
    result = run(beir, *options, "--batch-size", 8, "--select", "rankme", "--optimizer", "adamw")
    assert result.exit_code == 0
    facts = json.loads((out / "training.json").read_text())
    evaluations = facts["history"]["evaluations"]
    assert facts["best"]["step"] == max(evaluations, key=lambda e: e["rankme"])["step"]
    said = " ".join(result.output.split())
    assert f"Chosen by RankMe: step {facts['best']['step']}" in said
    assert "necessary for good vectors, not sufficient" in said
    with pytest.raises(InputError, match="select"):
        run(beir, "--model", encoder, "--out", tmp_path / "b", "--select", "labels")
