"""RankMe: parity with two public implementations, the streaming meter, selection, the callback."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from two_processes import process_group

from fullrank.core.errors import InputError
from fullrank.spectra import RankMeMeter, rankme, select_by_rankme

NAMES = [
    "gauss",
    "lowrank",
    "decay",
    "mean_shift",
    "zero_columns",
    "wide",
    "rank1",
    "ill_conditioned",
    "unit_rows",
]
FULL_RANK = ["gauss", "decay", "mean_shift", "unit_rows"]

pytestmark = pytest.mark.filterwarnings("ignore:.*RankMe still grows")


@pytest.fixture(scope="module")
def reference():
    with np.load(Path(__file__).parents[1] / "reference" / "rankme" / "rankme.npz") as data:
        return dict(data)


@pytest.mark.parametrize("name", NAMES)
def test_parity(reference, name):
    Z = reference[f"Z:{name}"]
    for eps in ("1e-7", "1e-5"):
        expected = float(reference[f"rankme_eps{eps}_f64:{name}"])
        assert rankme(Z, eps=float(eps)) == pytest.approx(expected, rel=1e-9)
        single = float(reference[f"rankme_eps{eps}_f32:{name}"])
        assert rankme(Z.astype(np.float32), eps=float(eps)) == pytest.approx(single, abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cuts", [[], [1], [3, 4, 11]])
def test_the_meter_equals_one_shot_for_any_split(reference, name, cuts):
    Z = reference[f"Z:{name}"]
    meter = RankMeMeter()
    for batch in np.split(Z, cuts):
        meter.update(batch)
    tolerance = 1e-8 if name in FULL_RANK else 1e-5
    assert meter.compute() == pytest.approx(rankme(Z), rel=tolerance)
    assert meter.count == len(Z)


def test_the_meter_merges_resets_and_resumes(reference):
    Z = torch.from_numpy(reference["Z:gauss"])
    whole, one, two = RankMeMeter(), RankMeMeter(), RankMeMeter()
    whole.update(Z)
    two.update(Z[40:])
    two.merge(RankMeMeter())
    one.merge(two)
    one.update(Z[:40])
    assert one.compute() == pytest.approx(whole.compute(), rel=1e-12)

    resumed = RankMeMeter()
    resumed.update(torch.ones(3, 5))
    resumed.load_state_dict(two.state_dict())
    resumed.update(Z[:40])
    assert resumed.compute() == pytest.approx(whole.compute(), rel=1e-12)
    assert {t.dtype for t in whole.state_dict().values()} <= {torch.float64, torch.int64}

    whole.reset()
    assert whole.count == 0
    assert whole.state_dict() == {}
    with pytest.raises(InputError, match="no embeddings"):
        whole.compute()
    whole.load_state_dict({})
    whole.sync()  # nothing to do outside torch.distributed


def test_a_centred_meter(reference):
    Z = reference["Z:mean_shift"]
    meter = RankMeMeter(center=True)
    meter.update(Z[:50])
    meter.update(Z[50:])
    assert meter.compute() == pytest.approx(rankme(Z, center=True), rel=1e-8)
    assert meter.compute() > 20 > rankme(Z)


def _worker(rank, folder, shards, results):
    with process_group(folder, rank, len(shards)):
        meter = RankMeMeter()
        if len(shards[rank]):
            meter.update(shards[rank])
        meter.sync()
        results[rank] = meter.compute()


@pytest.mark.parametrize("cut", [30, 0])
def test_the_meter_over_two_processes(reference, tmp_path, cut):
    Z = torch.from_numpy(reference["Z:gauss"])
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_worker, (str(tmp_path), [Z[:cut], Z[cut:]], results), nprocs=2)
        values = [results[0], results[1]]
    assert values == pytest.approx([rankme(Z)] * 2, rel=1e-8)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(4, 40), k=st.integers(1, 8), scale=st.floats(1e-5, 1e5), seed=st.integers(0, 99)
)
def test_invariances(n, k, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    Z = torch.randn(n, k, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(k, k, generator=generator, dtype=torch.float64))[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = rankme(Z)
        for changed in (Z * scale, Z @ turn, Z[torch.randperm(n, generator=generator)]):
            assert rankme(changed) == pytest.approx(value, rel=1e-9)
        # eps is not renormalised away.
        assert 1 - 1e-6 <= value <= min(n, k) * (1 + 16e-7)


def test_known_values():
    assert rankme(torch.ones(10, 3)) == pytest.approx(1, abs=1e-4)
    Q = torch.linalg.qr(torch.randn(30, 5, generator=torch.Generator().manual_seed(0)))[0]
    assert rankme(Q) == pytest.approx(5, abs=1e-4)


@pytest.mark.parametrize(
    ("Z", "says"),
    [
        (torch.ones(5), "pool or flatten"),
        (torch.ones(2, 3, 4), "pool or flatten"),
        (torch.ones(0, 4), "empty"),
        (torch.ones(4, 2, dtype=torch.int64), "floating-point"),
        (np.array([[1.0, np.nan]]), "NaN"),
        (torch.zeros(8, 2), "all embeddings are zero"),
    ],
)
def test_bad_embeddings_are_named(Z, says):
    with pytest.raises(InputError, match=says):
        rankme(Z)
    meter = RankMeMeter()
    if says.startswith("all"):
        meter.update(Z)
        with pytest.raises(InputError, match=says):
            meter.compute()
    else:
        with pytest.raises(InputError):
            meter.update(Z)


def test_a_bad_batch_leaves_the_meter_as_it_was():
    meter = RankMeMeter()
    for bad in (torch.full((2, 3), float("inf")), torch.ones(3)):
        with pytest.raises(InputError):
            meter.update(bad)
    assert meter.count == 0
    meter.update(torch.eye(3).repeat(3, 1))
    with pytest.raises(InputError, match="width"):
        meter.update(torch.ones(2, 4))
    assert meter.compute() == pytest.approx(3, abs=1e-5)


@pytest.mark.filterwarnings("default")
def test_few_samples_are_warned_of():
    Z = torch.randn(15, 8, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="at least 16"):
        rankme(Z)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rankme(torch.cat([Z, Z]))


def test_selection():
    scores = {"0.1": 20.0, "0.001": 19.9, "0.01": 20.1, "1": 3.0}
    assert select_by_rankme(scores) == "0.001"
    assert select_by_rankme(scores, prefer="max") == "0.1"
    assert select_by_rankme(scores, tie_rtol=0) == "0.01"
    assert select_by_rankme({"b": 2.0, "a": 2.0}) == "b"
    assert select_by_rankme({"a": np.float32(2.0), "b": torch.tensor(3.0)}) == "b"
    generator = torch.Generator().manual_seed(0)
    wide, flat = torch.randn(40, 6, generator=generator), torch.ones(40, 6)
    assert select_by_rankme({"collapsed": flat, "healthy": wide}) == "healthy"


@pytest.mark.parametrize(
    ("runs", "options", "says"),
    [
        ({}, {}, "no runs"),
        ({"a": torch.ones(4, 2), "b": torch.ones(5, 2)}, {}, "one shape"),
        ({"a": 1.0}, {"prefer": "middle"}, "prefer"),
        ({"a": 1.0, "b": float("nan")}, {}, "'b' has a RankMe of nan"),
    ],
)
def test_runs_that_cannot_be_compared(runs, options, says):
    with pytest.raises(InputError, match=says):
        select_by_rankme(runs, **options)


@pytest.mark.parametrize("first", ["rankme", "run log"])
def test_callback_logs_at_every_evaluation(tmp_path, first):
    transformers = pytest.importorskip("transformers")
    from fullrank.spectra import RankMeCallback, RunLogCallback, read_run

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(4, 3)
            self.dropout = torch.nn.Dropout(0.5)

        def forward(self, x, labels=None):
            out = self.dropout(self.fc(x))
            return {"loss": (out - labels).square().mean(), "logits": out}

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 4, generator=generator)
    rows = [{"x": row, "labels": row[:3]} for row in x]
    torch.manual_seed(0)
    model = Model()
    callback = RankMeCallback(lambda m: (m(half, half[:, :3])["logits"] for half in x.split(16)))
    callbacks = [callback, RunLogCallback(ranks_every=0)]
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=2,
            eval_strategy="epoch",
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows,
        callbacks=callbacks if first == "rankme" else callbacks[::-1],
    )
    trainer.train()
    assert len(callback.history) == 2
    logged = [entry["eval/rankme"] for entry in trainer.state.log_history if "eval/rankme" in entry]
    assert logged == [score for _, score in callback.history]
    assert [*read_run(tmp_path).measures["RankMe"].values()] == logged
    # Dropout was off: the last score is that of the model as it now is.
    model.eval()
    assert logged[-1] == pytest.approx(rankme(model.fc(x)), rel=1e-6)
    assert isinstance(callback, transformers.TrainerCallback)
    # Where an evaluation is not logged; what was frozen stays so.
    model.train()
    model.dropout.eval()
    metrics = {}
    callback.on_evaluate(None, trainer.state, None, model=model, metrics=metrics)
    assert metrics["eval/rankme"] == pytest.approx(logged[-1])
    assert model.training
    assert not model.dropout.training
    with pytest.raises(InputError, match="function"):
        RankMeCallback(3)
