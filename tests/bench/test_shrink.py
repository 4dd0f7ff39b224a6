"""The comparison of shrinking methods: made, gone on with, shown; each method; bad input."""

import json
import math

import numpy as np
import pytest
import torch
from tiny_models import WORDS, save_encoder
from torch import nn
from typer.testing import CliRunner

from fullrank import datasets
from fullrank.bench import shrink as module
from fullrank.bench import shrink_jobs
from fullrank.bench.shrink import bench_shrink
from fullrank.bench.shrink_entrants import BASELINE, ENTRANTS, chosen_entrants
from fullrank.bench.shrink_sizes import ShrinkSize, shrink_size
from fullrank.bench.shrink_subject import Subject
from fullrank.bench.shrink_subjects import SUBJECTS
from fullrank.bench.shrink_table import Comparison, rows_of
from fullrank.bench.shrink_workbench import Workbench
from fullrank.cli.bench import app
from fullrank.compress import LowRankLinear, make_plan
from fullrank.compress.family import kept_at_most
from fullrank.core import Corpus, InputError, models
from fullrank.core.rank_rules import FractionOfBreakEven
from fullrank.datasets import Dataset

MICRO = ShrinkSize(
    "micro",
    *(8, 8, 8),
    *(64, 32, 4, 1),
    *(16, 1, 2, 16, 2, 2048),
    batch=8,
    steps=3,
    rounds=1,
    shares=(0.5,),
)


class Tiny(Subject):
    """Two blocks on numbers at random, whose classes a matrix of rank 4 made."""

    metric = "accuracy"
    grid = 1
    lr = 1e-3

    def __init__(self, *_):
        torch.manual_seed(0)
        blocks = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        self.original = nn.Sequential(blocks, nn.Linear(16, 5)).eval()
        self.layers = ("0.0", "0.1")
        self.x = torch.randn(96, 16)
        self.calibration = list(self.x.split(32))
        self.example = self.x[:8]

    def values(self, model):
        return (model(self.x).argmax(1) == self.original(self.x).argmax(1)).double().numpy()

    def loss(self, model, batch):
        return nn.functional.mse_loss(model(batch), self.original(batch).detach())

    def training(self, seed):
        while True:
            yield from self.calibration

    def cosine(self, model):
        return 1.0


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SUBJECTS, "tiny", Tiny)
    shrink_jobs._workbench.cache_clear()
    yield Workbench(Tiny(), steps=3)
    shrink_jobs._workbench.cache_clear()


@pytest.mark.parametrize("label", [entrant.label for entrant in ENTRANTS])
def test_every_method_makes_a_model_of_the_size(label, tiny, tmp_path):
    (entrant,) = chosen_entrants([label])
    before = {k: v.clone() for k, v in tiny.subject.original.state_dict().items()}
    found = shrink_jobs.work(shrink_jobs.shrink_job("tiny", entrant, 0.5, MICRO), str(tmp_path))
    assert "why" not in found
    assert 0.2 <= found["kept"] <= 0.5
    assert len(found["tuned"]["values"]) == 96
    assert ("one_shot" in found) == (label not in ("trp", "maestro"))
    assert set(found["speed"]) == {"float32", "bfloat16"}
    json.dumps(found, allow_nan=False)
    whole = shrink_jobs.work(shrink_jobs.original_job("tiny", MICRO), str(tmp_path))
    # Zeros are multiplied and stored as ever.
    assert (found["flops"] < whole["flops"]) == (label != "magnitude")
    assert (found["bytes"] < whole["bytes"]) == (label != "magnitude")
    bench = shrink_jobs._workbench.__wrapped__(
        json.dumps({"subject": "tiny", **MICRO.settings()}), str(tmp_path)
    )
    assert all(torch.equal(v, before[k]) for k, v in bench.subject.original.state_dict().items())


def test_pruning_keeps_the_largest_weights_and_training_keeps_the_zeros(tiny):
    (entrant,) = chosen_entrants(["magnitude"])
    pruned = entrant.shrink(tiny, 0.25)
    weights = torch.cat([pruned[0][i].weight.flatten() for i in (0, 1)])
    dense = torch.cat([tiny.subject.original[0][i].weight.flatten() for i in (0, 1)])
    kept = weights != 0
    assert int(kept.sum()) == 128
    assert dense[kept].abs().min() > dense[~kept].abs().max()
    before = weights.clone()
    entrant.tune(tiny, pruned, 0.25)
    after = torch.cat([pruned[0][i].weight.flatten() for i in (0, 1)])
    assert torch.equal(after != 0, kept)
    assert not torch.equal(after, before)


def test_welore_trains_its_low_rank_components_alone(tiny):
    (entrant,) = chosen_entrants(["welore"])
    small = entrant.shrink(tiny, 0.4)
    head = small[1].weight.clone()
    factors = {
        name: layer.first.clone()
        for name, layer in small.named_modules()
        if isinstance(layer, LowRankLinear)
    }
    entrant.tune(tiny, small, 0.4)
    assert torch.equal(small[1].weight, head)
    for name, layer in small.named_modules():
        if name in factors:
            assert not torch.equal(layer.first, factors[name])


def test_the_largest_number_within_a_share():
    model = nn.Sequential(nn.Linear(64, 64))

    def plan(share):
        return make_plan(model, FractionOfBreakEven(max(share, 0.05)))

    number, found = kept_at_most(0.5, plan)
    assert found.savings().kept == 0.5
    # Break-even is rank 32: 16 of them until 17 / 32.
    assert number == pytest.approx(17 / 32, abs=1e-6)
    with pytest.raises(InputError, match=r"keeps at least 3\.1%"):
        kept_at_most(0.01, plan)


def test_what_is_made_once_counts_each_time(tiny, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.process_time", lambda: float(next(clock)))
    first = tiny.timed(lambda: tiny.once("a", lambda: 7))
    again = tiny.timed(lambda: tiny.once("a", lambda: 8))
    assert first == (7, 3.0)
    # A second for itself, and that of what was there.
    assert again == (7, 2.0)


def _run(values, **more):
    return {"tuned": {"values": values, "cosine": None}, "flops": 5, **more}


def test_rows_compare_with_the_original_and_the_baseline():
    original = {
        "metric": "accuracy",
        "lower_is_better": False,
        "clusters": None,
        "values": [1.0, 1.0, 0.0, 1.0],
        "parameters": 10,
        "bytes": 40,
        "flops": 10,
    }
    runs = {
        (BASELINE, 0.5): _run([1.0, 0.0, 0.0, 1.0], kept=0.5),
        ("lord", 0.5): _run([1.0, 1.0, 0.0, 1.0]),
        ("pela", 0.5): {"why": "no linear layer"},
    }
    base, lord, pela = rows_of(original, runs)
    assert base.tuned.against is None
    assert base.tuned.change.mean == -0.25
    assert lord.tuned.change == (0.0, 0.0, 0.0)
    assert lord.tuned.against.mean == 0.25
    assert lord.tuned.against.lower <= 0 <= lord.tuned.against.upper
    assert (pela.tuned, pela.note) == (None, "no linear layer")
    found = Comparison(MICRO, {"tiny": original}, {"tiny": [base, lord, pela]})
    text = found.markdown()
    assert "accuracy 0.7500 of the original (higher is better)" in text
    assert "no linear layer" in text
    assert found.overview("tiny").rows == [
        [BASELINE, "- / 0.5000"],
        ["lord", "- / 0.7500"],
        ["pela", "-"],
    ]
    table = found.table("tiny")
    assert table.rows[0][table.columns.index("FLOPs")] == 0.5
    assert json.loads(json.dumps(found.to_json()))["rows"]["tiny"][1]["tuned"]["value"] == 0.75


def test_made_then_gone_on_with(tmp_path, monkeypatch):
    text = tmp_path / "data"
    text.mkdir()
    (text / "tinyshakespeare.txt").write_text("the quick brown fox jumps over it. " * 600)
    monkeypatch.setenv("FULLRANK_DATA", str(text))
    out = tmp_path / "bench"
    options = {"size": MICRO, "subjects": ["lm"], "methods": ["svd", "trp"], "progress": False}
    first = bench_shrink(out, **options)
    svd, trp = sorted(first.rows["lm"], key=lambda row: row.method)
    assert svd.tuned.change.lower <= svd.tuned.change.mean <= svd.tuned.change.upper
    assert svd.one_shot is not None
    assert trp.one_shot is None
    assert svd.kept < 1
    assert first.originals["lm"]["metric"] == "bits per byte"
    assert all(0 < v < math.inf for v in first.originals["lm"]["values"])
    assert "svd" in (out / "shrink.md").read_text()
    assert len(json.loads((out / "shrink.json").read_text())["rows"]["lm"]) == 2
    pytest.importorskip("matplotlib")
    assert "change of bits per byte" in (out / "lm.svg").read_text()

    # All is there already: the work is never asked for.
    monkeypatch.setattr(shrink_jobs, "work", print)
    again = bench_shrink(out, **options)
    assert again.rows == first.rows


def test_bad_input_is_found_before_anything_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_jobs", None)
    out = tmp_path / "bench"
    for message, options in [
        ("no model 'bert'", {"subjects": ["bert"]}),
        ("no method 'lasso'", {"methods": ["lasso"]}),
        ("size 'huge'", {"size": "huge"}),
    ]:
        with pytest.raises(InputError, match=message):
            bench_shrink(out, **options)
        assert not out.exists()
    with pytest.raises(InputError, match=r"share 1\.5"):
        shrink_size("quick", (1.5,))


def _collection(documents):
    words = WORDS[:30]
    texts = {str(i): f"{words[i % 30]} {words[i * 7 % 30]} rank" for i in range(documents)}
    corpus = Corpus(list(texts), list(texts.values()))
    queries = {"a": words[3], "b": words[5]}
    return Dataset("toy", corpus, queries, {"a": {"3": 1}, "b": {"5": 1, "35": 1}})


def test_an_encoder_is_measured_on_what_it_was_not_calibrated_on(tmp_path, monkeypatch):
    folder = str(save_encoder(tmp_path))
    load = models.load_sentence_transformer
    monkeypatch.setattr(
        models, "load_sentence_transformer", lambda _, device: load(folder, device=device)
    )
    monkeypatch.setattr(datasets, "cranfield", lambda: _collection(220))
    subject = SUBJECTS["cranfield"](MICRO, tmp_path)
    values = subject.values(subject.original)
    assert values.shape == (2,)
    assert 0 < values.max() <= 1
    assert subject.cosine(subject.original) == pytest.approx(1, abs=1e-6)
    assert not any("pooler" in name for name in subject.layers)
    assert sum(len(batch["input_ids"]) for batch in subject.calibration) == MICRO.texts
    bench = Workbench(subject, steps=2)
    (entrant,) = chosen_entrants(["gauss_newton"])
    small = entrant.shrink(bench, 0.5)
    assert subject.cosine(small) < 1
    batch = next(subject.training(0))
    assert subject.inputs(batch) is not batch
    assert subject.loss(subject.original, batch) < 1e-9
    assert subject.loss(small, batch) > 1e-9
    assert shrink_jobs._costs(bench, small, sparse=False)["kept"] <= 0.5

    monkeypatch.setattr(datasets, "cranfield", lambda: _collection(150))
    with pytest.raises(InputError, match="toy has 147 documents"):
        SUBJECTS["cranfield"](MICRO, tmp_path)


def test_images_that_are_not_there(monkeypatch, tmp_path):
    monkeypatch.delenv("FULLRANK_DATA", raising=False)
    with pytest.raises(InputError, match="FULLRANK_DATA"):
        SUBJECTS["cifar10"](MICRO, tmp_path)


def test_a_network_on_images_is_trained_once(monkeypatch, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import io

    import pyarrow
    from PIL import Image

    draw = np.random.default_rng(0)

    def cell():
        buffer = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue()}

    (tmp_path / "cifar10").mkdir()
    for name, count in (("train", 24), ("test", 16)):
        rows = {"img": [cell() for _ in range(count)], "label": [i % 10 for i in range(count)]}
        parquet.write_table(pyarrow.table(rows), tmp_path / "cifar10" / f"{name}.parquet")
    monkeypatch.setenv("FULLRANK_DATA", str(tmp_path))
    first, again = (SUBJECTS["cifar10"](MICRO, tmp_path) for _ in range(2))
    assert first.values(first.original).shape == (16,)
    assert np.array_equal(first.values(first.original), again.values(again.original))
    # Neither the first convolution nor the classifier.
    assert len(first.layers) == 14
    assert {name.split(".")[0] for name in first.layers}.isdisjoint({"0", "11"})


def test_the_command_hands_everything_on(monkeypatch, tmp_path):
    seen = {}

    def instead(out, **options):
        seen.update(options, out=out)
        return Comparison(options["size"], {}, {})

    monkeypatch.setattr(module, "bench_shrink", instead)
    arguments = ["shrink", "--quick", "--subject", "lm", "--method", "lord", "--share", "0.5"]
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path), "--workers", "2"])
    assert result.exit_code == 0, result.output
    assert seen.pop("size") == shrink_size("quick", (0.5,))
    assert seen == {
        "out": tmp_path,
        "subjects": ["lm"],
        "methods": ["lord"],
        "workers": 2,
        "threads": 1,
    }
