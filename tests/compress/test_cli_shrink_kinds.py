"""`fullrank shrink` on language models, classifiers and a user's own metric; and going on."""

import json
import math
import random
import shutil
import sys

import numpy as np
import pytest
import torch
import typer
from tiny_models import cross_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from fullrank.cli.shrink import shrink
from fullrank.cli.shrink_metrics import Accuracy, LanguageMetric, longest_input, own_metric
from fullrank.compress import FloorError, LowRankLinear, RankPlan, load
from fullrank.core.errors import InputError

TEXT = "the a of and rank matrix vector query document index model cat dog bird fish red"
WORDS = TEXT.split()


def run(*arguments):
    app = typer.Typer()
    app.command()(shrink)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def made(result):
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    return result


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    from fullrank.training.lm_data import byte_tokenizer

    folder = tmp_path_factory.mktemp("lm") / "model"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=257, num_attention_heads=2, max_position_embeddings=64, eos_token_id=256, **sizes
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    draw = random.Random(0)
    file.write_text(" ".join(draw.choices(WORDS, k=6000)))
    return file


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return cross_encoder(tmp_path_factory.mktemp("classifier"), labels=2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory, classifier):
    """Labels are what the model says: it is right at first."""
    model = AutoModelForSequenceClassification.from_pretrained(classifier).eval()
    tokenizer = AutoTokenizer.from_pretrained(classifier)
    draw = random.Random(1)
    texts = sorted({" ".join(draw.choices(WORDS, k=6)) for _ in range(240)})
    with torch.no_grad():
        inputs = tokenizer(texts, padding=True, return_tensors="pt")
        labels = model(**inputs).logits.argmax(-1).tolist()
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({"text": t, "label": x}) for t, x in zip(texts, labels, strict=True)]
    file.write_text("\n".join(lines))
    return file


QUICK = ["--any-speed", "--samples", 48, "--steps", 3, "--max-length", 32]


def test_a_language_model_to_a_ceiling_of_bits_per_byte(language_model, text, tmp_path):
    out = tmp_path / "small"
    given = ["--floor", "bpb<=120%", "--data", text, "--method", "greenformers,gauss_newton"]
    result = made(run(language_model, "--out", out, *given, *QUICK))
    assert "test part" in result.output
    facts = json.loads((out / "shrink.json").read_text())
    assert facts["kind"] == "language model"
    assert set(facts["curves"]) == {"greenformers", "gauss_newton"}
    assert facts["lower"] >= 1 / 1.2
    holding = [c["kept"] for curve in facts["curves"].values() for c in curve if c["holds"]]
    plan = RankPlan.load(out / "plan.json")
    assert plan.savings().kept == min(holding)
    model = load(out)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert any(isinstance(m, LowRankLinear) for m in model.modules())
    assert not (out / ".work").exists()


def test_a_model_in_half_precision_stays_in_it(language_model, text, tmp_path):
    from transformers import AutoModelForCausalLM

    half, out = tmp_path / "half", tmp_path / "small"
    shutil.copytree(language_model, half)
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    given = ["--floor", "bpb<=120%", "--data", text, "--method", "greenformers", *QUICK]
    made(run(half, "--out", out, *given))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (half, out)]
    assert sizes[1] < sizes[0]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert any(isinstance(m, LowRankLinear) for m in model.modules())


def test_bits_per_byte_are_those_of_training(language_model):
    from transformers import AutoModelForCausalLM

    from fullrank.datasets.texts import Texts
    from fullrank.training.lm_data import LMData, bits_per_byte, byte_tokenizer

    model = AutoModelForCausalLM.from_pretrained(language_model)
    texts = Texts.divided("words", [" ".join(WORDS * 30), "é" * 700])
    data = LMData.of(texts, byte_tokenizer(), 32, 10_000)
    metric = LanguageMetric(data.dev, data.bytes_per_token, batch_size=3)
    values = metric(model)
    assert len(values) == len(data.dev)
    assert values.mean() == pytest.approx(bits_per_byte(model, data, 4, None), rel=1e-5)
    perplexity = LanguageMetric(data.dev, data.bytes_per_token, perplexity=True)(model)
    per_token = values.mean() * data.bytes_per_token
    assert math.log2(perplexity) == pytest.approx(per_token, rel=1e-5)


def test_a_classifier_to_a_floor_of_accuracy(classifier, rows, tmp_path):
    out = tmp_path / "small"
    given = ["--floor", "accuracy>=60%", "--data", rows, "--method", "pela"]
    made(run(classifier, "--out", out, *given, *QUICK))
    facts = json.loads((out / "shrink.json").read_text())
    assert facts["kind"] == "classifier"
    assert facts["reference"] == 1.0
    assert facts["method"] == "pela"
    assert 0 <= facts["test"]["ratio"] <= 1
    model = load(out)
    assert type(model).__name__ == "BertForSequenceClassification"


def test_texts_are_cut_to_the_models_positions(tmp_path):
    """Also where the tokenizer knows no limit, and where padding has a position."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    folder = cross_encoder(tmp_path / "bert", labels=2)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.model_max_length = 10**30
    rows = [("cat dog " * 300, 0), ("cat", 1)]
    assert len(Accuracy(rows, tokenizer)(model)) == 2
    assert longest_input(model, tokenizer) == model.config.max_position_embeddings
    assert longest_input(model, tokenizer, 7) == 7
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = RobertaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=34, **sizes
    )
    assert len(Accuracy(rows, tokenizer)(RobertaForSequenceClassification(config))) == 2


def test_heads_that_would_be_lost_are_refused(classifier, tmp_path):
    from transformers import BertForTokenClassification

    folder = tmp_path / "ner"
    shutil.copytree(classifier, folder)
    config = AutoModelForSequenceClassification.from_pretrained(classifier).config
    BertForTokenClassification(config).save_pretrained(folder)
    result = run(folder, "--out", tmp_path / "out", "--keep", 0.5, "--method", "greenformers")
    assert isinstance(result.exception, InputError)
    assert "a model ForTokenClassification" in str(result.exception)


def test_labels_the_model_does_not_have_are_named(classifier, tmp_path):
    file = tmp_path / "rows.jsonl"
    lines = [json.dumps({"text": f"cat {i}", "label": "noun"}) for i in range(60)]
    file.write_text("\n".join(lines))
    given = ["--floor", "accuracy>=60%", "--data", file, *QUICK]
    result = run(classifier, "--out", tmp_path / "out", *given)
    assert isinstance(result.exception, InputError)
    assert "'noun' is none of the model's" in str(result.exception)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module in the working folder: distances of logits to those of the first model seen."""
    (tmp_path / "own_metric_module.py").write_text(
        "import torch\n"
        "seen, calls = [], []\n"
        "def error(model, tokenizer):\n"
        "    ids = tokenizer('the cat of rank', return_tensors='pt')['input_ids']\n"
        "    with torch.no_grad():\n"
        "        logits = model(input_ids=ids).logits[0].mean(0)\n"
        "    seen.append(logits)\n"
        "    return 1 + (logits - seen[0]).abs().numpy()\n"
        "def words(model):\n"
        "    return 'good'\n"
        "def wants_more(model, queries):\n"
        "    return 0.0\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != str(tmp_path)])
    yield "own_metric_module"
    sys.modules.pop("own_metric_module", None)


def test_a_metric_of_ones_own(language_model, text, tmp_path, own):
    out = tmp_path / "small"
    given = ["--floor", "error<=150%", "--metric", f"{own}:error", "--data", text]
    made(run(language_model, "--out", out, *given, "--method", "welore,greenformers", *QUICK))
    facts = json.loads((out / "shrink.json").read_text())
    assert facts["reference"] == 1.0
    assert "test" not in facts


@pytest.mark.parametrize(
    ("function", "message"),
    [("words", "gave a str"), ("wants_more", "wants queries")],
)
def test_metrics_that_cannot_be_used(language_model, text, tmp_path, own, function, message):
    given = ["--floor", "m>=50%", "--metric", f"{own}:{function}", "--data", text, *QUICK]
    result = run(language_model, "--out", tmp_path / "out", *given)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)


def test_a_metric_is_called_with_the_tokenizer_if_it_asks(own):
    found = own_metric(f"{own}:error", tokenizer=None)
    with pytest.raises(TypeError, match="NoneType"):
        found(None)


def test_a_ceiling_that_no_plan_keeps_says_the_best_and_another_goes_on(
    language_model, text, tmp_path
):
    out = tmp_path / "small"
    given = ["--data", text, "--method", "greenformers", *QUICK, "--no-recover"]
    result = run(language_model, "--out", out, "--floor", "bpb<=0.5", *given)
    assert isinstance(result.exception, FloorError)
    assert "the best of 6 keeps" in str(result.exception)
    record = out / ".work" / "greenformers" / "search.json"
    before = json.loads(record.read_text())["measured"]
    assert len(before) == 6
    made(run(language_model, "--out", out, "--floor", "bpb<=60", *given))
    facts = json.loads((out / "shrink.json").read_text())
    known = {tuple(m["values"]) for m in before}
    values = [c["value"] for c in facts["curves"]["greenformers"]]
    assert any(np.mean(v) == pytest.approx(values[-1]) for v in known)


def test_an_interrupted_search_goes_on(language_model, text, tmp_path, monkeypatch):
    def measured(stop_after=None):
        """Count candidates; interrupt after some."""
        from fullrank.compress.family_weights import WeightFamily

        plain, calls = WeightFamily.build, []

        def build(self, plan):
            if stop_after is not None and len(calls) == stop_after:
                raise KeyboardInterrupt
            calls.append(plan)
            return plain(self, plan)

        monkeypatch.setattr(WeightFamily, "build", build)
        return calls

    given = [
        "--floor", "bpb<=101%", "--data", text, "--method", "greenformers", *QUICK,
    ]  # fmt: skip
    whole = tmp_path / "whole"
    with monkeypatch.context():
        all_calls = measured()
        made(run(language_model, "--out", whole, *given))
        monkeypatch.undo()
    out = tmp_path / "parts"
    measured(stop_after=3)
    assert run(language_model, "--out", out, *given).exit_code == 130
    monkeypatch.undo()
    other = run(language_model, "--out", out, *given, "--seed", 1)
    assert "another" in str(other.exception)
    rest = measured()
    made(run(language_model, "--out", out, *given))
    # The chosen one may be built once more, to take the weights that were kept.
    assert len(rest) <= len(all_calls) - 3 + 1
    assert RankPlan.load(out / "plan.json") == RankPlan.load(whole / "plan.json")
    one, other = (load(folder).state_dict() for folder in (out, whole))
    assert all(torch.equal(one[name], other[name]) for name in other)
    figures = []
    for folder in (out, whole):
        curve = json.loads((folder / "shrink.json").read_text())["curves"]["greenformers"]
        figures.append([{k: v for k, v in c.items() if k != "seconds"} for c in curve])
    assert figures[0] == figures[1]


def test_layers_slower_here_stay_dense_by_default(language_model, text, tmp_path, monkeypatch):
    from fullrank.compress import measured_speed

    def everything_slower(layer, x, calls):
        return 2.0 if isinstance(layer, LowRankLinear) else 1.0

    monkeypatch.setattr(measured_speed, "_measured", {})
    monkeypatch.setattr(measured_speed, "_clock", everything_slower)
    given = ["--keep", 0.5, "--data", text, "--method", "greenformers", "--samples", 48]
    result = run(language_model, "--out", tmp_path / "none", *given, "--no-recover")
    assert "every layer stays dense" in str(result.exception)
    assert "--any-speed" in str(result.exception)

    def faster_when_wide(layer, x, calls):
        wide = layer.weight.shape[0] == 64
        factorised = 0.5 if wide else 1.5
        return factorised if isinstance(layer, LowRankLinear) else 1.0

    monkeypatch.setattr(measured_speed, "_measured", {})
    monkeypatch.setattr(measured_speed, "_clock", faster_when_wide)
    made(run(language_model, "--out", tmp_path / "some", *given, "--no-recover"))
    plan = RankPlan.load(tmp_path / "some" / "plan.json")
    assert {n.rpartition(".")[2] for n, e in plan.items() if e.rank} == {"gate_proj", "up_proj"}
    assert plan["model.layers.0.mlp.up_proj"].options["seconds"]["factorised"] == 0.5
    assert "left dense" in plan["model.layers.0.mlp.down_proj"].reason
