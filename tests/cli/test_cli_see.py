"""`fullrank see model` and `see run`."""

import json

import pytest
import torch
from tiny_models import save_byte_language_model

WORDS = [a + b for a in "bcdfghkl" for b in ("ab", "el", "in", "ot", "um", "ay")]


@pytest.fixture
def folders(tiny_encoder, tmp_path):
    """A tiny encoder's network, and the same after a little tuning."""
    transformers = pytest.importorskip("transformers")
    source = str(tiny_encoder(*WORDS))
    model = transformers.AutoModel.from_pretrained(source)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for name in ("base", "tuned"):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        torch.manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return tmp_path / "base", tmp_path / "tuned"


def test_two_models_and_texts(fullrank, folders, tmp_path):
    base, tuned = folders
    texts = tmp_path / "texts.txt"
    texts.write_text(" ".join(WORDS * 40))
    outcome = fullrank(
        *("see", "model", base, "--against", tuned, "--data", texts, "--samples", 20),
        *("--html", tmp_path / "page.html", "--plan", tmp_path / "plan.json", "--rank", 4),
    )
    assert outcome.code == 0, outcome
    for title in ("X-ray of base", "Overlap of leading", "Inputs of the layers", "base and tuned"):
        assert title in outcome.out
    text = (tmp_path / "page.html").read_text()
    assert "X-ray of base and tuned" in text
    assert str(tmp_path) not in text
    assert json.loads((tmp_path / "plan.json").read_text())["purpose"] == "factor"


@pytest.fixture
def language_model(tmp_path):
    pytest.importorskip("transformers")
    return save_byte_language_model(tmp_path / "lm")


def test_a_plan_for_a_language_model_can_be_applied(fullrank, language_model, tmp_path):
    plan, figures = tmp_path / "plan.json", tmp_path / "figures.json"
    outcome = fullrank(
        *("see", "model", language_model, "--energy", 0.5, "--plan", plan, "--json", figures)
    )
    assert outcome.code == 0, outcome
    kinds = {m["name"]: m["kind"] for m in json.loads(figures.read_text())["matrices"]}
    assert kinds["lm_head"] == "head"
    assert kinds["model.layers.1.mlp.up_proj"] == "linear"
    outcome = fullrank(
        "shrink", language_model, "--plan", plan, "--any-speed", "--out", tmp_path / "x"
    )
    assert outcome.code == 0, outcome


def test_options_that_do_not_fit(fullrank, folders):
    outcome = fullrank("see", "model", folders[0], "--rank", 4)
    assert outcome.code == 2
    assert "--against" in outcome.err
    outcome = fullrank("see", "model", folders[0], "--data", "absent.txt")
    assert outcome.code == 2


def test_a_run_is_watched_to_its_end(fullrank, tmp_path, monkeypatch):
    path = tmp_path / "events.jsonl"
    lines = [{"kind": "log", "step": s, "loss": 1 / s} for s in (1, 2)]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert fullrank("see", "run", tmp_path).code == 0
    looks = []

    def sleep(seconds):
        looks.append(seconds)
        if len(looks) == 1:
            path.rename(tmp_path / "hidden")
        if len(looks) == 2:
            (tmp_path / "hidden").rename(path)
            with path.open("a") as file:
                file.write('\n{"kind": "log", "step": 3, "loss": 0.25}\n')
                file.write('{"kind": "log", "step": 3, "train_runtime": 1.0}\n{"kind": "lo')

    monkeypatch.setattr("time.sleep", sleep)
    outcome = fullrank("see", "run", tmp_path, "--watch", "--html", tmp_path / "run.html")
    assert outcome.code == 0
    assert looks == [2.0, 2.0]
    assert "ended by its trainer" in " ".join(outcome.out.split())
    assert "1 damaged" in outcome.out
    assert "refresh" not in (tmp_path / "run.html").read_text()
    assert fullrank("see", "run", tmp_path / "absent").code == 2
