"""The comparison of adapters from beginning to end: entrants, runs, tables; bad input."""

import dataclasses
import json

import pytest
import torch
from typer.testing import CliRunner

from fullrank.bench import adapters as module
from fullrank.bench import bench_adapters
from fullrank.bench.adapter_board import AdapterBoard, AdapterRow, adapter_row
from fullrank.bench.adapter_digits import digits, upright_model
from fullrank.bench.adapter_entrants import chosen_tunings, tunings
from fullrank.bench.adapter_scenes import SCENES, Measure
from fullrank.bench.adapter_sizes import TASKS, AdapterSize, adapter_size
from fullrank.cli.bench import app
from fullrank.core import InputError

pytest.importorskip("peft")
pytest.importorskip("sklearn")

MICRO = dataclasses.replace(
    adapter_size("digits"),
    name="micro",
    steps=4,
    evaluations=1,
    rates=(1e-3, 1e-2),
    seeds=2,
    cycle=2,
)


def test_made_then_gone_on_with(tmp_path, monkeypatch):
    out = tmp_path / "bench"
    options = {"tasks": [MICRO], "methods": ["full", "eva"], "workers": 1, "progress": False}
    first = bench_adapters(out, **options)["digits"]
    rows = {row.name: row for row in first.rows}
    assert rows["full"].trained == sum(p.numel() for p in upright_model().parameters())
    assert rows["eva"].trained < rows["full"].trained / 5
    assert rows["eva"].saved_bytes < rows["full"].saved_bytes
    assert rows["full"].start_s == 0 < rows["eva"].start_s
    for row in rows.values():
        assert row.lr in MICRO.rates
        assert row.seeds == 2
        assert row.step_ms > 0
        # Weights, and gradients and two moments of what is trained.
        weights = 4 * sum(p.numel() for p in upright_model().parameters())
        assert row.peak_bytes >= weights + 12 * row.trained
        # Four steps leave the upright digits known, the turned ones not yet.
        assert row.means[1] > row.means[0]
    assert first.base[1] > 0.9 > 0.5 > first.base[0]
    kinds = [json.loads(line)["kind"] for line in (out / "runs.jsonl").read_text().splitlines()]
    assert sorted(kinds) == ["base", "start", "start", "time", *["tune"] * 6]
    assert "untouched" in (out / "digits.md").read_text()
    assert len(json.loads((out / "digits.json").read_text())["rows"]) == 2
    if (out / "digits.svg").exists():
        assert "full fine-tuning" in (out / "digits.svg").read_text()

    # All is there already: the work is never asked for.
    def asked(*_):
        raise AssertionError("a job was done again")

    monkeypatch.setattr(module.adapter_jobs, "work", asked)
    again = bench_adapters(out, **options)["digits"]
    assert again == first


def test_every_method_of_adapt_is_an_entrant():
    from fullrank.adapters.adapt_methods import METHODS, Method

    found = tunings({**METHODS, "new": Method("New", "nothing", lambda request: None, rank=32)})
    assert {way.method for way in found} == {"full", "new", *METHODS}
    assert len({way.name for way in found}) == len(found) == len(METHODS) + 3
    size = adapter_size("digits")
    ranks = {way.name: way.adapter(size).get("rank") for way in tunings()}
    assert (ranks["full"], ranks["lora"], ranks["lora_pro"]) == (None, 4, 4)
    assert ranks["randlora"] == size.most_rank < METHODS["randlora"].rank
    optimizers = {way.name: way.stepped(0.1, size)["name"] for way in found}
    assert optimizers["gradnormlorp"] == "gradnormlorp_adamw"
    assert optimizers["lora_pro"] == "lora_pro"
    assert {optimizers[name] for name in ("full", "lora", "eva", "new")} == {"adamw"}


@pytest.mark.parametrize("task", TASKS)
def test_every_way_makes_a_run_with_the_same_budget(task, tmp_path):
    size = adapter_size(task, quick=True)
    scene = SCENES[task](size, tmp_path)
    runs = [
        scene.run(way.adapter(size), way.stepped(rate, size), 0, "cpu")
        for way in tunings()
        for rate in size.rates
    ]
    assert len({run.loop.model_dump_json() for run in runs}) == 1
    assert len({run.data.model_dump_json() for run in runs}) == 1
    assert {run.optimizer.lr for run in runs} == set(size.rates)


def test_the_digits_are_turned_and_in_the_same_parts():
    for upright, turned in zip(digits(turned=False), digits(turned=True), strict=True):
        assert torch.equal(upright[1], turned[1])
        images, others = (part[0].view(-1, 8, 8) for part in (upright, turned))
        assert torch.equal(images.rot90(dims=(1, 2)), others)


def run_of(score, *measures):
    if score is None:
        return {"score": None, "why": "diverged"}
    return {"score": score, "loss": 2 * score, "measures": list(measures)}


def test_a_row_has_mean_and_spread_and_says_which_seeds_diverged():
    runs = [run_of(1.0, 0.5, 3.0), run_of(None), run_of(2.0, 0.7, 5.0)]
    start = {"trained": 10, "bytes": 40, "peak_bytes": 99, "start_s": 0.5}
    row = adapter_row("x", "X", 0.1, "edge", runs, start, {"step_ms": 1.5})
    assert row.means == pytest.approx((0.6, 4.0))
    assert row.spreads == pytest.approx((0.02**0.5, 2**0.5))
    assert row.loss == 3.0
    assert row.note == "diverged on 1 of 3 seeds"
    assert (row.seeds, row.trained, row.saved_bytes) == (2, 10, 40)
    assert adapter_row("x", "X", None, "diverged at every rate", [], None, None).means == ()


@pytest.mark.parametrize("lower", [False, True])
def test_the_best_row_is_first_and_the_base_last(lower):
    rows = [
        AdapterRow("none", "None", note="diverged at every rate"),
        AdapterRow("low", "Low", 0.1, means=(0.25,), spreads=(0.125,)),
        AdapterRow("high", "High", 0.1, means=(0.75,)),
    ]
    board = AdapterBoard(MICRO, [Measure("m", ".2f", lower)], [0.5], rows)
    order = ["low", "high", "none"] if lower else ["high", "low", "none"]
    assert [row.name for row in board.ranked] == order
    text = board.markdown()
    assert "0.25 ± 0.12" in text
    assert text.index("None") < text.index("untouched")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["lore"]}, "no adapter 'lore' .* full, lora, lora_pro"),
        ({"tasks": ["digit"]}, "task 'digit'; it is one of digits, retrieval, language"),
        ({"tasks": ["digits", MICRO]}, "named twice: digits, digits"),
        ({"device": "tpu"}, "device 'tpu'"),
    ],
)
def test_bad_input_is_found_before_anything_is_run(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "run_jobs", None)
    with pytest.raises(InputError, match=message):
        bench_adapters(tmp_path / "bench", **{"tasks": ["digits"], **options})
    assert not (tmp_path / "bench").exists()


def test_sizes_take_the_middle_of_the_grid():
    assert adapter_size("digits", rates=1).rates == (0.01,)
    assert adapter_size("digits", quick=True, seeds=1).seeds == 1
    for choice in ({"rates": 9}, {"rates": 0}, {"seeds": 0}):
        with pytest.raises(InputError, match=r"=[09]"):
            adapter_size("digits", **choice)
    assert [way.name for way in chosen_tunings(["eva", "full"])] == ["full", "eva"]


def test_the_command_hands_everything_on(monkeypatch, tmp_path):
    seen = {}

    def instead(out, **options):
        seen.update(options, out=out)
        return {"digits": AdapterBoard(MICRO, [Measure("m")])}

    monkeypatch.setattr(module, "bench_adapters", instead)
    arguments = ["adapters", "--task", "digits", "--method", "eva", "--quick", "--seeds", 1]
    rest = ["--rates", 1, "--out", tmp_path / "x", "--workers", 3, "--remeasure"]
    result = CliRunner().invoke(app, [str(a) for a in (*arguments, *rest)])
    assert result.exit_code == 0, result.output
    (size,) = seen.pop("tasks")
    assert isinstance(size, AdapterSize)
    assert (size.task, size.name, len(size.rates), size.seeds) == ("digits", "quick", 1, 1)
    assert seen == {
        "out": tmp_path / "x",
        "methods": ["eva"],
        "workers": 3,
        "threads": 1,
        "device": "cpu",
        "remeasure": True,
    }
