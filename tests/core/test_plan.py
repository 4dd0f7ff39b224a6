"""`RankPlan`: round trips, merging, scaling, what it saves, and what it refuses."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fullrank.core import InputError, PlanEntry, PlanError, RankPlan, break_even, model_fingerprint

sizes = st.integers(1, 60)
purposes = st.sampled_from(["factor", "optimizer", "adapter"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@st.composite
def entries(draw):
    shape = draw(sizes), draw(sizes)
    return PlanEntry(
        shape,
        draw(st.none() | st.integers(1, min(shape))),
        method=draw(st.sampled_from(["svd", "output_pca"])),
        reason=draw(st.text(max_size=5)),
        options=draw(st.dictionaries(st.text(max_size=3), json_values, max_size=2)),
    )


names = st.sampled_from(["a", "b", "layer.0.query", "layer.1.query", "é"])
mappings = st.dictionaries(names, entries(), max_size=4)


@st.composite
def plans(draw, purpose=purposes):
    return RankPlan(
        draw(mappings),
        purpose=draw(purpose),
        source=draw(st.sampled_from(["weight", "activation", "gradient"])),
        fingerprint=draw(st.sampled_from(["", "0123456789abcdef"])),
    )


@given(plans())
def test_json_comes_back(plan):
    back = RankPlan.from_json(plan.to_json())
    assert back == plan
    assert hash(back) == hash(plan)
    assert list(back) == list(plan)
    assert dict(back) == dict(plan)
    assert (back.purpose, back.source, back.fingerprint) == (
        plan.purpose,
        plan.source,
        plan.fingerprint,
    )
    assert back.to_json() == plan.to_json()


@given(plans())
def test_equal_plans_hash_alike_in_any_order(plan):
    turned = plan._with(dict(reversed(list(plan.items()))))
    assert turned == plan
    assert hash(turned) == hash(plan)


@given(mappings, mappings)
def test_merge_prefers_whom_it_is_told_and_raises_otherwise(first, second):
    a, b = RankPlan(first), RankPlan(second)
    assert a.merge(b, prefer="other") == RankPlan({**first, **second})
    assert a.merge(b, prefer="self") == RankPlan({**second, **first})
    for prefer in ("self", "other"):
        assert list(a.merge(b, prefer=prefer)) == [*first, *(n for n in second if n not in first)]
    if any(first[n] != second[n] for n in first.keys() & second.keys()):
        with pytest.raises(PlanError, match="say prefer="):
            a.merge(b)
    else:
        assert a.merge(b) == RankPlan({**first, **second})
    assert a.merge(a) == a


def test_merge_refuses_other_purposes_and_models():
    entry = {"a": PlanEntry((4, 4), 1)}
    with pytest.raises(PlanError, match="'factor' and 'adapter'"):
        RankPlan(entry).merge(RankPlan(entry, purpose="adapter"))
    with pytest.raises(PlanError, match="of models x and y"):
        RankPlan(entry, fingerprint="x").merge(RankPlan(entry, fingerprint="y"))
    assert RankPlan(entry).merge(RankPlan(entry, fingerprint="y")).fingerprint == "y"
    with pytest.raises(InputError, match="prefer='mine'"):
        RankPlan(entry).merge(RankPlan(entry), prefer="mine")


@given(plans(), st.floats(1e-3, 1e3))
def test_scale_rounds_and_clips(plan, factor):
    scaled = plan.scale(factor)
    assert list(scaled) == list(plan)
    for name, entry in plan.items():
        rank = scaled[name].rank
        if entry.rank is None:
            assert rank is None
            continue
        top = min(entry.shape)
        if plan.purpose == "factor":
            top = min(top, break_even(*entry.shape))
        if top == 0:
            assert rank is None
        else:
            assert rank == min(max(1, round(entry.rank * factor)), top)
    if plan.purpose == "factor":
        assert scaled.savings().planned <= scaled.savings().dense


@given(sizes, sizes)
def test_break_even_is_the_last_rank_that_saves(m, n):
    r = break_even(m, n)
    assert r * (m + n) < m * n
    assert (r + 1) * (m + n) >= m * n
    assert 0 <= r < max(min(m, n), 1)


@given(plans(), purposes)
def test_savings_count_numbers(plan, purpose):
    saved = plan.savings(purpose)
    each = {"factor": 1, "adapter": 1, "optimizer": 2}[purpose]
    assert saved.dense == each * sum(e.shape[0] * e.shape[1] for e in plan.values())
    planned = 0
    for e in plan.values():
        m, n = e.shape
        if e.rank is None:
            planned += {"factor": m * n, "adapter": 0, "optimizer": 2 * m * n}[purpose]
        elif purpose == "optimizer":
            planned += 2 * e.rank * max(m, n) + e.rank * min(m, n)
        else:
            planned += e.rank * (m + n)
    assert saved.planned == planned
    assert saved.kept == (planned / saved.dense if plan else 1.0)


def test_files_come_back_and_bad_ones_are_refused(tmp_path):
    plan = RankPlan({"a": PlanEntry((4, 4), 1)})
    assert RankPlan.load(plan.save(tmp_path / "plan.json")) == plan
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe")
    with pytest.raises(PlanError, match=r"bad\.json is not a rank plan"):
        RankPlan.load(tmp_path / "bad.json")


def changed(**changes):
    data = json.loads(RankPlan({"a": PlanEntry((4, 6), 1)}).to_json())
    entry = {**data["entries"]["a"], **changes.pop("entry", {})}
    return json.dumps({**data, "entries": {"a": entry}, **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "7",
        "null",
        "{}",
        changed(format="1"),
        changed(entries=[]),
        changed(entries={"a": 3}),
        changed(purpose="else"),
        changed(source=None),
        changed(entry={"shape": [4, 6, 1]}),
        changed(entry={"shape": 4}),
        changed(entry={"shape": ["4", "6"]}),
        changed(entry={"shape": [4.0, 6.0]}),
        changed(entry={"shape": [0, 6]}),
        changed(entry={"rank": 5}),
        changed(entry={"rank": 0}),
        changed(entry={"rank": 1.5}),
        changed(entry={"rank": "1"}),
        changed(entry={"surprise": 1}),
    ],
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(PlanError):
        RankPlan.from_json(text)


def test_a_newer_format_asks_for_an_upgrade():
    with pytest.raises(PlanError, match="upgrade fullrank"):
        RankPlan.from_json(changed(format=99))


def test_numpy_integers_become_plain_ones():
    entry = PlanEntry(tuple(np.array([4, 6])), np.int64(2))
    assert (type(entry.rank), [type(s) for s in entry.shape]) == (int, [int, int])
    assert RankPlan.from_json(RankPlan({"a": entry}).to_json())["a"] == entry


def test_numpy_numbers_in_options_become_plain_ones():
    entry = PlanEntry((8, 8), 2, options={"stack": np.int64(2), "shares": [np.float32(0.5)]})
    assert entry.matrix_shape == (4, 8)
    plan = RankPlan({"fc": entry})
    assert RankPlan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["entries"]["fc"]["options"] == {"stack": 2, "shares": [0.5]}
    with pytest.raises(PlanError, match="no JSON values"):
        PlanEntry((8, 8), 2, options={"kept": np.zeros(3)})


@pytest.mark.parametrize(("shape", "rank"), [((8, 8), True), ((True, 8), 1)])
def test_a_truth_value_is_no_rank(shape, rank):
    with pytest.raises(PlanError, match="integer"):
        PlanEntry(shape, rank)


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), float("inf")])
def test_scale_refuses_what_is_no_factor(factor):
    with pytest.raises(InputError, match="positive, finite factor"):
        RankPlan({"a": PlanEntry((4, 4), 1)}).scale(factor)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)
        self.act = nn.ReLU()


class Conv1D(nn.Module):
    """Stores its weight (in, out), as the layer of that name in transformers does."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(nn.Parameter(nn.Linear(4, 6).weight.detach())))


def test_check_finds_the_matrices_under_their_canonical_names():
    model = Block()
    plan = RankPlan(
        {"fc": PlanEntry((4, 6), 2)}, fingerprint=model_fingerprint(model), source="activation"
    )
    assert plan.check(model, "factor") == {"fc": model.fc}
    wrapped = nn.Module()
    wrapped.module = model
    assert plan.check(wrapped, "factor") == {"fc": model.fc}
    dense = RankPlan({"fc": PlanEntry((4, 6), None)})
    assert dense.check(model, "factor") == {}


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (RankPlan({"fc": PlanEntry((4, 6), 2)}, purpose="adapter"), "not 'factor'"),
        (RankPlan({"fc": PlanEntry((4, 6), 2)}, fingerprint="0" * 16), "fingerprint 0000"),
        (RankPlan({"gone": PlanEntry((4, 6), 2)}), "no module 'gone'"),
        (RankPlan({"fc": PlanEntry((4, 5), 2)}), r"for \(4, 5\), the model has \(4, 6\)"),
        (RankPlan({"fc": PlanEntry((6, 4), 2)}), r"for \(6, 4\), the model has \(4, 6\)"),
        (RankPlan({"fc": PlanEntry((8, 3), None)}), r"for \(8, 3\), the model has \(4, 6\)"),
        (RankPlan({"norm": PlanEntry((2, 4), 2)}), r"the model has \(4,\)"),
        (RankPlan({"act": PlanEntry((2, 4), 2)}), "the model has None"),
    ],
)
def test_check_refuses_another_purpose_model_name_or_shape(plan, says):
    with pytest.raises(PlanError, match=says):
        plan.check(Block(), "factor")


def test_check_reads_transposed_weights_and_convolutions():
    model = nn.ModuleDict({"t": Conv1D(), "c": nn.Conv2d(3, 4, 5)})
    plan = RankPlan({"t": PlanEntry((4, 6), 2), "c": PlanEntry((20, 15), 2, scheme="spatial")})
    assert set(plan.check(model, "factor")) == {"t", "c"}
    with pytest.raises(PlanError, match="t: the plan is for"):
        RankPlan({"t": PlanEntry((6, 4), 2)}).check(model, "factor")
    with pytest.raises(PlanError, match="c: the plan is for"):
        RankPlan({"c": PlanEntry((20, 16), 2)}).check(model, "factor")


def test_a_plan_is_read_by_people():
    plan = RankPlan(
        {"a.b": PlanEntry((8, 32), 4, reason="90 % of energy"), "c": PlanEntry((4, 4), None)}
    )
    lines = str(plan).splitlines()
    assert lines[0] == ("RankPlan(1 of 2 matrices, purpose='factor', source='weight', keeps 64.7%)")
    assert lines[1].split() == ["a.b", "8", "x", "32", "4", "90", "%", "of", "energy"]
    assert lines[2].split() == ["c", "4", "x", "4", "dense"]
    assert str(RankPlan({})).startswith("RankPlan(0 of 0")


def test_a_plan_is_a_mapping_that_does_not_change():
    source = {"a": PlanEntry((4, 4), 1)}
    plan = RankPlan(source)
    source["b"] = PlanEntry((4, 4), 2)
    assert list(plan) == ["a"]
    with pytest.raises(TypeError):
        plan["b"] = PlanEntry((4, 4), 2)
    with pytest.raises(AttributeError):
        plan["a"].rank = 2
    assert plan != {"a": PlanEntry((4, 4), 1)}
    for bad in ({"purpose": "speed"}, {"source": "guess"}):
        with pytest.raises(PlanError, match="it is one of"):
            RankPlan(source, **bad)


def test_a_file_that_is_no_plan_is_named(tmp_path):
    file = tmp_path / "other.json"
    file.write_text('{"format": 1}')
    with pytest.raises(PlanError, match=r"other\.json: .* there is no 'entries' in it"):
        RankPlan.load(file)
