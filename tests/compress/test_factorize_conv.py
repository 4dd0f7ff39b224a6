"""Convolutions in plans, factorisation, reports and on disk."""

import copy
import json

import pytest
import torch
from torch import nn

from fullrank.compress import (
    Budget,
    CalibrationStats,
    Energy,
    Fixed,
    FractionOfBreakEven,
    LoRDConfig,
    LowRankConv1d,
    LowRankConv2d,
    LowRankLinear,
    PlanFamily,
    RankPlan,
    export_dense,
    factorize,
    layer_spectra,
    load,
    lord_compress,
    make_plan,
    matricise,
    report,
    save,
)
from fullrank.compress.layers_build import build_layer
from fullrank.core.errors import InputError, PlanError, StoreError
from fullrank.core.plan import PlanEntry

SCHEMES = ("channel", "spatial", "decouple")


def net(dtype=torch.float32, **settings):
    torch.manual_seed(0)
    chosen = {"padding": 1, "stride": 2, **settings}
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, **chosen),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 40),
    ).to(dtype)


def images(n=40, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    return [torch.randn(n // 4, 3, 10, 11, generator=g).to(dtype) for _ in range(4)]


def test_each_layer_is_read_by_its_own_scheme():
    assert [matricise(m).scheme for m in (nn.Linear(3, 2), nn.Conv2d(3, 2, 3))] == [
        "linear",
        "channel",
    ]
    grouped = matricise(nn.Conv2d(4, 8, 3, groups=2))
    assert (grouped.shape, grouped.stack) == ((4, 18), 2)
    with pytest.raises(InputError, match="a Linear is read by scheme 'linear', not 'channel'"):
        matricise(nn.Linear(3, 2), "channel")
    with pytest.raises(InputError, match="no weight"):
        matricise(nn.ReLU())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_counts_and_factorize_keeps_to_it(scheme):
    model, batches = net(torch.float64), images(dtype=torch.float64)
    plan = make_plan(model, FractionOfBreakEven(0.5), scheme=scheme)
    assert {name: e.scheme for name, e in plan.items()} == {
        "0": scheme,
        "3": scheme,
        "7": "linear",
    }
    assert RankPlan.from_json(plan.to_json()) == plan
    dense = sum(m.weight.numel() for m in (model[0], model[3], model[7]))
    assert plan.savings().dense == dense
    small = factorize(copy.deepcopy(model), plan)
    kept = sum(p.numel() for n, p in small.named_parameters() if n[0] in "037" and "bias" not in n)
    assert plan.savings().planned == kept < dense
    assert small(batches[0]).shape == model(batches[0]).shape
    table = report(small)
    assert sum(row[3] for row in table.rows) == sum(
        plan[row[0]].size("factor") for row in table.rows
    )
    for name, layer in ((row[0], small[int(row[0])]) for row in table.rows):
        weight = model[int(name)].weight
        error = (layer.merged_weight() - weight).square().sum() / weight.square().sum()
        assert layer.error == pytest.approx(error.item(), rel=1e-6)
    # A plan for half of the ranks is smaller, and still one that can be applied.
    half = plan.scale(0.5)
    assert half.savings().planned < plan.savings().planned
    factorize(model, half)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "settings",
    [
        {"stride": (2, 1), "padding": (2, 0), "dilation": (1, 2), "bias": False},
        {"padding_mode": "reflect", "dilation": 2},
        {"stride": 1, "padding": "same"},
    ],
)
def test_at_full_rank_the_model_computes_the_same(scheme, settings):
    model = net(torch.float64, **settings)
    found = matricise(model[3], scheme)
    # Beyond break-even, where factorize would leave it alone: built by hand.
    options = {"stack": found.stack} if found.stack > 1 else {}
    shape = (found.stack * found.shape[0], found.shape[1])
    entry = PlanEntry(shape, min(found.shape), scheme=scheme, options=options)
    x = images(dtype=torch.float64)[0]
    wanted = model.eval()(x)
    model[3] = build_layer(model[3], entry)
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-10)


def test_groups_and_dimensions_without_the_scheme_are_split_by_channel():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 32, 3, groups=2), nn.Conv2d(32, 32, 3, groups=32))
    plan = make_plan(model, Fixed(3), scheme="spatial")
    assert (plan["0"].scheme, plan["0"].stack, plan["0"].matrix_shape) == ("channel", 2, (16, 36))
    assert plan["0"].size("factor") == 2 * 3 * (16 + 36)
    # Of a depthwise convolution nothing can be saved.
    assert plan["1"].rank is None
    x = torch.randn(2, 8, 9, 9)
    small = factorize(copy.deepcopy(model), plan)
    assert type(small[0]) is LowRankConv2d
    assert type(small[1]) is nn.Conv2d
    torch.testing.assert_close(small[0].to_dense()(x), small[0](x), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="scheme 'wide'"):
        make_plan(model, Fixed(3), scheme="wide")


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv3d])
def test_other_dimensions_load_again(kind, tmp_path):
    torch.manual_seed(0)

    def fresh():
        return nn.Sequential(kind(6, 16, 3, stride=2, padding=1), nn.ReLU())

    model = fresh()
    x = torch.randn(2, 6, *[7] * (1 if kind is nn.Conv1d else 3))
    small = factorize(model, make_plan(model, Fixed(4)))
    assert isinstance(small[0], LowRankConv1d) == (kind is nn.Conv1d)
    assert torch.equal(load(save(small, tmp_path / "m"), into=fresh())(x), small(x))


def test_a_convolution_never_grows_and_bad_plans_change_nothing():
    model = net()
    before = copy.deepcopy(model.state_dict())
    entry = PlanEntry((24, 108), 20, scheme="channel")
    assert type(factorize(model, RankPlan({"3": entry}))[3]) is nn.Conv2d
    cases = {
        "a convolution is read by": PlanEntry((24, 108), 4),
        "reads a convolution by scheme 'channel'": PlanEntry(
            (36, 72), 4, "output_pca", scheme="spatial"
        ),
        r"the plan is for \(108, 24\)": PlanEntry((108, 24), 4, scheme="channel"),
        "24 matrices": PlanEntry((288, 9), 2, scheme="decouple", options={"stack": 12}),
    }
    for message, bad in cases.items():
        with pytest.raises((InputError, PlanError), match=message):
            factorize(model, RankPlan({"3": bad}))
    with pytest.raises(PlanError, match="is no stack of 7"):
        PlanEntry((24, 108), 4, scheme="channel", options={"stack": 7})
    grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=2))
    plan = RankPlan({"0": PlanEntry((8, 36), 2, "output_pca", "channel", options={"stack": 2})})
    with pytest.raises(InputError, match="in 2 groups is factorised by its weight alone"):
        factorize(grouped, plan, [torch.randn(9, 8, 5, 5)])
    model[3].weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"3: the weight holds NaN"):
        factorize(model, make_plan(net(), Fixed(2), include="3"))
    with pytest.raises(InputError, match=r"3: the weight holds NaN"):
        make_plan(model, Energy(0.9))
    model[3].weight.data.copy_(before["3.weight"])
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_tied_convolutions_stay_tied_and_tied_weights_dense(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = self.b = nn.Conv2d(8, 8, 3, padding=1)
            self.c, self.d = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
            self.d.weight = self.c.weight

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x))))

    torch.manual_seed(0)
    model = Tied()
    small = factorize(model, make_plan(model, Fixed(3)))
    assert small.a is small.b
    assert type(small.a) is LowRankConv2d
    assert small.c.weight is small.d.weight
    assert type(small.c) is nn.Conv2d
    x = torch.randn(1, 8, 9, 9)
    again = load(save(small, tmp_path / "tied"), into=Tied())
    assert again.a is again.b
    assert torch.equal(again(x), small(x))


def test_weight_normalised_convolutions_are_left_alone():
    model = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 3)), nn.Conv1d(8, 8, 3)
    )
    assert list(make_plan(model, Fixed(2))) == ["1"]


# -- what flows through ------------------------------------------------------------------------


def test_output_pca_has_the_least_error_at_every_place():
    model, batches = net(torch.float64, bias=False), images(dtype=torch.float64)
    plan = make_plan(
        model, Fixed(5), include="3", method="output_pca", spectra=layer_spectra(net())
    )
    inner = nn.Sequential(*model[:3]).eval()
    x = inner(torch.cat(batches)).detach()
    by_data, by_weight = (
        factorize(copy.deepcopy(model), p, batches, progress=False)[3]
        for p in (plan, make_plan(model, Fixed(5), include="3"))
    )
    y = model[3](x).movedim(1, -1).flatten(0, -2)
    assert by_data.bias is not None
    assert by_weight.bias is None

    def error(layer):
        return (layer(x).movedim(1, -1).flatten(0, -2) - y).square().sum()

    # Of all affine maps of that rank principal components have the least error.
    spread = y - y.mean(0)
    least = torch.linalg.svdvals(spread)[5:].square().sum()
    assert error(by_data).item() == pytest.approx(least.item(), rel=1e-6)
    assert by_data.error == pytest.approx((least / spread.square().sum()).item(), rel=1e-6)
    assert error(by_data) < error(by_weight)


def test_statistics_count_places_and_do_not_depend_on_batches():
    model, batches = net(), images()
    targets = {"0": model[0], "3": model[3]}
    one, other = (CalibrationStats(targets, gradients=True) for _ in range(2))
    one.observe(model, batches, progress=False)
    other.observe(model, [torch.cat(batches)], progress=False)
    assert (one["0"].side, one["0"].count, one["3"].count) == ("output", 40 * 110, 40 * 30)
    torch.testing.assert_close(one["3"].moments.covariance, other["3"].moments.covariance)
    assert one["3"].reaction.gradient.count == 40 * 30


@pytest.mark.parametrize("method", ["output_pca", "gauss_newton"])
def test_families_hold_convolutions(method):
    model, batches = net(), images()
    targets = {"0": model[0], "3": model[3], "7": model[7]}
    stats = CalibrationStats(targets, gradients=True).observe(model, batches, progress=False)
    family = PlanFamily(model, stats, method=method, grid=1)
    plan = family.plan(0.6)
    assert {e.scheme for e in plan.values()} == {"channel", "linear"}
    assert plan.savings().kept <= 0.6
    assert family.build(plan)(batches[0]).shape == (10, 40)


def test_lord_on_a_conv_net():
    model, table = lord_compress(net(), images(), LoRDConfig(ranks={"3": 6}), progress=False)
    assert type(model[3]) is LowRankConv2d
    assert table.rows[0][5] == "output_pca"


def test_a_budget_counts_every_filter():
    model = net()
    for scheme in SCHEMES:
        plan = make_plan(model, Budget(0.6, grid=1), scheme=scheme)
        assert plan.savings().kept <= 0.6, scheme


# -- what it costs -----------------------------------------------------------------------------


def test_operations_are_those_that_run():
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    for scheme in SCHEMES:
        dense = nn.Conv2d(8, 16, 2, stride=2)
        model = nn.Sequential(dense)
        x = torch.randn(1, 8, 12, 12)
        with FlopCounterMode(display=False) as before:
            model(x)
        factorize(model, make_plan(model, Fixed(2), scheme=scheme))
        with FlopCounterMode(display=False) as after:
            model(x)
        row = report(model).rows[0]
        assert row[7] * 36 == before.get_total_flops()
        # The strides leave no margin, except that a first convolution may run where it is unused.
        assert row[8] * 36 == after.get_total_flops()


# -- on disk -----------------------------------------------------------------------------------


def test_plain_models_with_convolutions_load_bit_equal(tmp_path):
    model = net()
    x = images()[0]
    for scheme in SCHEMES:
        small = factorize(copy.deepcopy(model), make_plan(model, Fixed(2), scheme=scheme)).eval()
        assert isinstance(small[7], LowRankLinear)
        path = save(small, tmp_path / scheme)
        again = load(path, into=net()).eval()
        assert again[3].scheme == scheme
        assert torch.equal(again(x), small(x))
        assert again[3].error == small[3].error
    record = json.loads((path / "fullrank.json").read_text())
    assert record["format"] == 2
    with pytest.raises(StoreError, match="has not"):
        load(path, into=nn.Sequential(*net()[:3], nn.Conv2d(12, 24, 5)))
    with pytest.raises(StoreError, match="has not"):
        load(path, into=nn.Sequential(nn.Linear(3, 12)))
    shells = factorize(net(), make_plan(model, Fixed(2), scheme="decouple"), init=False).eval()
    shells.load_state_dict(small.state_dict())
    assert torch.equal(shells(x), small(x))
    assert "multiplied out" in export_dense(small, tmp_path / "dense")


def resnet():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.ResNetConfig(
        num_channels=3,
        embedding_size=8,
        hidden_sizes=[8, 16],
        depths=[1, 1],
        layer_type="basic",
        num_labels=5,
    )
    return transformers.ResNetForImageClassification(config).eval()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_resnet_loads_by_from_pretrained(scheme, tmp_path):
    model, x = resnet(), torch.randn(2, 3, 32, 32)
    factorize(model, make_plan(model, FractionOfBreakEven(0.7), scheme=scheme))
    convolutions = [row for row in report(model).rows if "convolution" in row[0]]
    assert len(convolutions) >= 5
    folder = save(model, tmp_path / "resnet")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == 2
    again = type(model).from_pretrained(folder)
    assert torch.equal(again(x).logits, model(x).logits)
    assert torch.equal(load(folder)(x).logits, model(x).logits)
    # Without its head; and saved once more.
    base = type(model.resnet).from_pretrained(folder)
    assert torch.equal(base(x).pooler_output, model.resnet(x).pooler_output)
    base.save_pretrained(tmp_path / "again")
    twice = type(model.resnet).from_pretrained(tmp_path / "again")
    assert torch.equal(twice(x).pooler_output, base(x).pooler_output)
    assert again.to(torch.bfloat16)(x.bfloat16()).logits.dtype == torch.bfloat16
    half = type(model).from_pretrained(folder, dtype=torch.bfloat16)
    assert half.resnet.embedder.embedder.convolution.first.dtype == torch.bfloat16
    text = json.loads((folder / "config.json").read_text())
    layers = text["quantization_config"]["layers"]
    next(iter(layers.values()))["shape"] = [3, 3, 3, 3]
    (folder / "config.json").write_text(json.dumps(text))
    with pytest.raises(StoreError, match="does not belong"):
        type(model).from_pretrained(folder)


def test_a_conv1d_model_loads_by_from_pretrained(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        vocab_size=30,
        num_mel_bins=8,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        d_model=16,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_source_positions=20,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = transformers.WhisperForConditionalGeneration(config).eval()
    factorize(model, make_plan(model, Fixed(4), include=["*.conv*", "*.fc*"]))
    assert type(model.model.encoder.conv2) is LowRankConv1d
    folder = save(model, tmp_path / "whisper")
    again = type(model).from_pretrained(folder)
    inputs = {"input_features": torch.randn(1, 8, 40), "decoder_input_ids": torch.ones(1, 3).long()}
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_groups_of_zero_weights_have_an_error_that_is_a_number():
    conv = nn.Conv2d(4, 8, 3, groups=2)
    nn.init.zeros_(conv.weight)
    assert (
        build_layer(conv, PlanEntry((8, 18), 2, "snmf", "channel", options={"stack": 2})).error == 0
    )
