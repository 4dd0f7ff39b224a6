"""`fullrank shrink`: reading of floors, a plan by share, bad input."""

import json
import random

import pytest
import torch
import typer
from typer.testing import CliRunner

from fullrank.cli.shrink import Floor, parse_floor, shrink
from fullrank.cli.shrink_tasks import read_calibration
from fullrank.compress import Distillation, LowRankLinear, RankPlan, measured_speed
from fullrank.core.errors import InputError
from fullrank.core.plan import PlanEntry

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def encoder(tiny_encoder):
    return tiny_encoder(*LETTERS)


@pytest.fixture
def texts(tmp_path):
    draw = random.Random(0)
    lines = [" ".join(draw.choices(LETTERS, k=8)) for _ in range(100)]
    (tmp_path / "texts.txt").write_text("\n".join(lines))
    (tmp_path / "texts.jsonl").write_text("\n".join(json.dumps({"text": x}) for x in lines))
    return tmp_path / "texts.txt"


def run(*arguments):
    app = typer.Typer()
    app.command()(shrink)
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_floors_are_read():
    assert parse_floor("nDCG@10>=97%") == Floor("nDCG@10", 0.97, True)
    assert parse_floor(" R@100 >= 0.42 ") == Floor("R@100", 0.42, False)
    for bad in ("nDCG@10", "nDCG@10>97%", "nDCG@10>=97.%", "nDCG@10>=120%", ">=0.4", "RR>=42"):
        with pytest.raises(InputError, match="floor"):
            parse_floor(bad)


def test_a_share_then_its_plan(encoder, texts, tmp_path):
    from sentence_transformers import SentenceTransformer

    first = run(
        encoder, "--out", tmp_path / "a", "--keep", 0.6, "--calibrate", texts,
        "--no-recover", "--any-speed",
    )  # fmt: skip
    assert first.exit_code == 0, first.output
    plan = RankPlan.load(tmp_path / "a" / "plan.json")
    assert plan.savings().kept <= 0.6
    model = SentenceTransformer(str(tmp_path / "a"), device="cpu")
    layers = [m for m in model.modules() if isinstance(m, LowRankLinear)]
    assert len(layers) == sum(e.rank is not None for e in plan.values()) > 0
    second = run(
        encoder, "--out", tmp_path / "b", "--plan", tmp_path / "a" / "plan.json",
        "--calibrate", texts.with_suffix(".jsonl"), "--no-recover", "--any-speed",
    )  # fmt: skip
    assert second.exit_code == 0, second.output
    other = SentenceTransformer(str(tmp_path / "b"), device="cpu")
    found, wanted = (m.encode("a b c", convert_to_tensor=True) for m in (other, model))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


def test_layers_that_stay_dense_for_their_speed_are_counted(encoder, texts, tmp_path, monkeypatch):
    def seconds(layer, x, count):
        return 2.0 if isinstance(layer, LowRankLinear) and layer.in_features == 64 else 1.0

    monkeypatch.setattr(measured_speed, "_clock", seconds)
    monkeypatch.setattr(measured_speed, "_measured", {})
    given = ["--keep", 0.6, "--method", "svd", "--calibrate", texts, "--no-recover"]
    result = run(encoder, "--out", tmp_path / "out", *given)
    assert result.exit_code == 0, result.output
    plan = RankPlan.load(tmp_path / "out" / "plan.json")
    assert plan.savings().kept > 0.6
    assert sum(e.rank is None and "seconds" in e.options for e in plan.values()) == 1
    said = "asked for 60%; 1 layer stays dense as slower here: --any-speed"
    words = " ".join(result.output.split())
    assert said in words, words[-600:]


@pytest.mark.parametrize("method", ["lord", "pca", "svd", "gauss_newton"])
def test_methods_that_calibrate(encoder, texts, tmp_path, method):
    out = tmp_path / "out"
    given = ["--keep", 0.6, "--calibrate", texts, "--method", method, "--no-recover", "--any-speed"]
    result = run(encoder, "--out", out, *given)
    assert result.exit_code == 0, result.output
    assert 0 < RankPlan.load(out / "plan.json").savings().kept <= 0.6


@pytest.mark.parametrize("method", ["trp", "maestro"])
@pytest.mark.parametrize("recover", ["--recover", "--no-recover"])
def test_methods_that_train_first(encoder, texts, tmp_path, method, recover):
    given = ["--keep", 0.6, "--calibrate", texts, "--method", method, "--steps", 4, recover]
    result = run(encoder, "--out", tmp_path / "out", *given, "--any-speed")
    assert result.exit_code == 0, result.output
    assert 0 < RankPlan.load(tmp_path / "out" / "plan.json").savings().kept <= 0.6
    assert not (tmp_path / "out" / ".work").exists()


@pytest.mark.parametrize(("method", "keep"), [("greenformers", 0.6), ("welore", 0.9)])
def test_methods_without_data(encoder, tmp_path, method, keep):
    given = ["--keep", keep, "--method", method, "--any-speed"]
    result = run(encoder, "--out", tmp_path / "out", *given)
    assert result.exit_code == 0, result.output
    plan = RankPlan.load(tmp_path / "out" / "plan.json")
    assert 0 < plan.savings().kept <= keep
    assert json.loads((tmp_path / "out" / "shrink.json").read_text())["method"] == method


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --floor, --keep and --plan: "),
        (["--keep", 0], "--keep 0"),
        (["--plan", "{plan}"], "planned by output_pca, which needs texts"),
        (["--keep", 0.5, "--method", "svd", "--calibrate", "{one}"], "or --no-recover"),
        (["--keep", 0.5, "--floor", "RR>=90%"], "--plan, not --floor and --keep"),
        (["--floor", "RR>=90%"], "pass --data"),
        (["--floor", "RR<=90%", "--data", "pydocs"], "higher RR is better"),
        (["--floor", "bpb>=90%", "--data", "pydocs"], "lower bits per byte is better"),
        (["--floor", "m<=90%", "--metric", "a:b"], "at least 100 %"),
        (["--floor", "m>=90%", "--metric", "a", "--calibrate", "{texts}"], "module:function"),
        (["--floor", "m>=9", "--metric", "no_such:f", "--calibrate", "{texts}"], "No module"),
        (["--floor", "m>=9", "--metric", "math:no", "--calibrate", "{texts}"], "has no 'no'"),
        (["--floor", "m>=9", "--metric", "math:pi", "--calibrate", "{texts}"], "a float"),
        (["--keep", 0.5, "--metric", "math:pi"], "give a floor"),
        (["--keep", 0.5, "--method", "svd,lord", "--calibrate", "{texts}"], "by --floor only"),
        (["--keep", 0.5, "--method", "trp"], "trp needs texts"),
        (["--keep", 0.5, "--method", "pela"], "pela trains"),
        (["--keep", 1.5], "--keep 1.5"),
        (["--floor", "foo>=97%", "--data", "nowhere"], "there is no metric 'foo'"),
        (["--keep", 0.5, "--method", "maestro"], "maestro needs texts"),
        (["--keep", 0.5, "--method", "qr"], "it is one of gauss_newton"),
        (["--keep", 0.01, "--method", "welore"], "welore keeps at least"),
        (["--keep", 0.5], "needs texts to calibrate on"),
        (["--keep", 0.5, "--calibrate", "texts.pdf"], "come as .txt or .jsonl"),
        (["--keep", 0.5, "--calibrate", "absent.txt"], "cannot be read"),
        (["--keep", 0.5, "--data", "nowhere"], "'nowhere' is no collection"),
        (["--plan", "absent.json", "--calibrate", "{texts}"], "no plan at"),
    ],
)
def test_bad_input_is_named_and_nothing_is_written(encoder, texts, tmp_path, arguments, message):
    plan = RankPlan({"encoder.layer.0.output.dense": PlanEntry((32, 64), 4, "output_pca")})
    (tmp_path / "one.txt").write_text("a single text")
    known = {"texts": texts, "plan": plan.save(tmp_path / "p.json"), "one": tmp_path / "one.txt"}
    given = [str(a).format(**known) for a in arguments]
    result = run(encoder, "--out", tmp_path / "out", *given)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_the_present_folder_and_a_handful_of_texts(encoder, tmp_path, monkeypatch):
    """Texts that hold what Unicode calls the end of a line are one text each."""
    from sentence_transformers import SentenceTransformer

    file, out = tmp_path / "few.jsonl", tmp_path / "out"
    rows = [{"text": f"{letter}\u2028b c d"} for letter in LETTERS[:5]]
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    assert len(read_calibration(file)) == 5
    out.mkdir()
    monkeypatch.chdir(out)
    given = ["--keep", 0.6, "--calibrate", file, "--method", "svd", "--steps", 2, "--any-speed"]
    result = run(encoder, "--out", ".", *given)
    assert result.exit_code == 0, f"{result.output}\n{result.exception!r}"
    assert (out / "plan.json").is_file()
    # The training itself makes two batches of a handful.
    model = SentenceTransformer(str(out), device="cpu")
    assert len(Distillation(model, read_calibration(file))._batches) == 3
    with pytest.raises(InputError, match="give two texts or more"):
        Distillation(model, ["a b c"])


def test_a_folder_in_use_is_left_alone(encoder):
    result = run(encoder, "--out", encoder, "--keep", 0.5)
    assert "exists already" in str(result.exception)


def test_an_interruption_while_writing_leaves_no_model(encoder, texts, tmp_path, monkeypatch):
    given = [
        encoder,
        "--out",
        tmp_path / "out",
        "--keep",
        0.6,
        "--calibrate",
        texts,
        "--no-recover",
        "--any-speed",
    ]

    def interrupted(*_):
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir()) | {tmp_path / "out"}
    with monkeypatch.context() as patched:
        patched.setattr(RankPlan, "save", interrupted)
        assert run(*given).exit_code == 130
    # What was calibrated is kept; of the model nothing is there.
    assert set(tmp_path.iterdir()) == before
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]
    again = run(*given)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "out" / "plan.json").is_file()
    assert set(tmp_path.iterdir()) == before
    assert not (tmp_path / "out" / ".work").exists()
