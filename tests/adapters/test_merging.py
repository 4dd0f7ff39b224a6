"""Adapters merged into one: sums of updates, best approximations, what is refused."""

import pytest
import torch
from torch import nn

from fullrank.adapters import FlyLoraConfig
from fullrank.adapters.adapt import adapt
from fullrank.adapters.export import save_as_lora, to_lora
from fullrank.adapters.lora_files import LowRank
from fullrank.adapters.merging import merge_adapters, merge_updates
from fullrank.core.errors import InputError

peft = pytest.importorskip("peft")


def update(m, n, r, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, n, generator=generator, dtype=dtype)
    return LowRank(A, torch.randn(m, r, generator=generator, dtype=dtype))


def product(update):
    return update.B @ update.A


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 10))


def two_tasks():
    """LoRA of rank 2 on both layers, and one of rank 3 and another scaling on the last alone."""
    model = peft.get_peft_model(net(), peft.LoraConfig(r=2, target_modules=["0", "2"]), "one")
    model.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=6, target_modules=["2"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize(("m", "n"), [(5, 31), (31, 5), (2, 3)])
def test_without_a_rank_nothing_is_lost(m, n):
    parts = [update(m, n, 1, 0, torch.float64), update(m, n, 2, 1, torch.float64)]
    report = merge_updates([{"fc": part} for part in parts], [0.5, -2.0])
    expected = 0.5 * product(parts[0]) - 2.0 * product(parts[1])
    torch.testing.assert_close(product(report.updates["fc"]), expected)
    assert len(report.updates["fc"].A) == min(3, m)
    assert report.lost["fc"] == 0.0


def test_a_rank_gives_the_best_approximation():
    parts = [update(9, 14, 3, seed, torch.float64) for seed in range(3)]
    report = merge_updates([{"fc": part} for part in parts], rank=4)
    whole = sum(product(part) for part in parts) / 3
    S = torch.linalg.svdvals(whole)
    gone = torch.linalg.matrix_norm(whole - product(report.updates["fc"]))
    assert float(gone) == pytest.approx(float(S[4:].norm()), rel=1e-9)
    assert report.lost["fc"] == pytest.approx(float(S[4:].norm() / S.norm()), rel=1e-9)
    assert report.table().rows == [["fc", 4, report.lost["fc"]]]


def test_one_adapter_is_itself_and_nothing_stays_nothing():
    part = update(4, 6, 2, 0)
    torch.testing.assert_close(product(merge_updates([{"fc": part}]).updates["fc"]), product(part))
    zero = LowRank(part.A, torch.zeros_like(part.B))
    report = merge_updates([{"fc": zero}], rank=1)
    assert not product(report.updates["fc"]).any()
    assert report.lost["fc"] == 0.0


def test_half_precision_comes_back_as_it_was():
    parts = [update(8, 8, 2, seed) for seed in range(2)]
    half = [LowRank(part.A.bfloat16(), part.B.bfloat16()) for part in parts]
    found = merge_updates([{"fc": part} for part in half]).updates["fc"]
    assert found.A.dtype == found.B.dtype == torch.bfloat16
    expected = sum(product(part) for part in parts) / 2
    torch.testing.assert_close(product(found).float(), expected, rtol=0.1, atol=0.1)


def test_the_merged_adapter_is_the_weighted_sum():
    model = two_tasks()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    deltas = {
        name: {k: product(v) for k, v in to_lora(model, name).items()} for name in ("one", "two")
    }
    report = merge_adapters(model, ["one", "two"], [0.7, 0.4])
    assert model.active_adapter == "one"
    assert list(model.peft_config) == ["one", "two", "merged"]
    for name, tensor in before.items():
        assert torch.equal(model.state_dict()[name], tensor)
    merged = {k: product(v) for k, v in to_lora(model, "merged").items()}
    torch.testing.assert_close(merged["0"], 0.7 * deltas["one"]["0"])
    torch.testing.assert_close(merged["2"], 0.7 * deltas["one"]["2"] + 0.4 * deltas["two"]["2"])
    assert {name: len(u.A) for name, u in report.updates.items()} == {"0": 2, "2": 5}


def test_the_merged_adapter_saves_and_loads(tmp_path):
    model = two_tasks()
    merge_adapters(model, ["one", "two"], rank=2, into="both")
    model.set_adapter("both")
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(2))
    model.save_pretrained(tmp_path, selected_adapters=["both"])
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "both")
    torch.testing.assert_close(again(x), model(x))
    with again.disable_adapter():
        assert torch.equal(again(x), net()(x))
    torch.testing.assert_close(again.merge_and_unload()(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("adapters", "options", "message"),
    [
        (["one", "three"], {}, "no adapter 'three'"),
        (["one", "one"], {}, "named once"),
        ([], {}, "no adapter to merge"),
        (["one", "two"], {"weights": [1.0]}, "2 finite numbers"),
        (["one", "two"], {"weights": [1.0, float("nan")]}, "2 finite numbers"),
        (["one", "two"], {"rank": 0}, "rank=0"),
        (["one"], {"into": "two"}, "name of a new adapter"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(adapters, options, message):
    model = two_tasks()
    with pytest.raises(InputError, match=message):
        merge_adapters(model, adapters, **options)
    assert list(model.peft_config) == ["one", "two"]


def test_adapters_of_other_types_are_refused():
    ia3 = peft.IA3Config(target_modules=["2"], feedforward_modules=[])
    with pytest.raises(InputError, match="IA3 adapter"):
        merge_adapters(peft.get_peft_model(net(), ia3), ["default"])
    with pytest.raises(InputError, match="not of low rank"):
        merge_adapters(adapt(net(), "dora", rank=2), ["default"])
    with pytest.raises(InputError, match="no adapter 'default'"):
        merge_adapters(net(), ["default"])


def test_lora_ga_merges_on_a_fresh_base_alone(tmp_path):
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(20, 12, generator=generator), torch.randn(20, 10, generator=generator)
    model = adapt(
        net(),
        "lora_ga",
        rank=2,
        data=[(x, y)],
        loss_fn=lambda m, batch: (m(batch[0]) - batch[1]).square().mean(),
        progress=False,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    with pytest.raises(InputError, match="changed this model's base weights"):
        merge_adapters(model, ["default"])
    assert list(model.peft_config) == ["default"]
    fresh = peft.PeftModel.from_pretrained(net(), save_as_lora(model, tmp_path / "lora"))
    merge_adapters(fresh, ["default"])
    fresh.set_adapter("merged")
    torch.testing.assert_close(fresh(x), model(x), rtol=1e-5, atol=1e-5)


def test_adapters_of_other_bases_and_broken_ones_are_refused():
    with pytest.raises(InputError, match="another base model: fc"):
        merge_updates([{"fc": update(4, 6, 2, 0)}, {"fc": update(4, 7, 2, 0)}])
    with pytest.raises(InputError, match="adapter 1 has no layer"):
        merge_updates([{"fc": update(4, 6, 2, 0)}, {}])
    broken = LowRank(torch.full((1, 3), float("nan")), torch.ones(3, 1))
    with pytest.raises(InputError, match="not finite"):
        merge_updates([{"fc": broken}])


class Ends(nn.Module):
    """A layer whose name is the end of another's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc, self.block = nn.Linear(6, 6), nn.ModuleDict({"fc": nn.Linear(6, 6)})

    def forward(self, x):
        return self.fc(self.block["fc"](x))


def test_a_merged_adapter_is_on_no_other_layer():
    for config in (
        peft.LoraConfig(r=2, target_modules="fc", init_lora_weights=False),
        FlyLoraConfig(r=2, k=1, target_modules="fc", init_weights=False),
    ):
        model = peft.get_peft_model(Ends(), config)
        merge_adapters(model, ["default"])
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
        expected = model(x)
        model.set_adapter("merged")
        torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("more", [{"modules_to_save": ["1"]}, {"bias": "all"}])
def test_what_a_sum_would_leave_out_is_refused(more):
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"], **more))
    with pytest.raises(InputError, match=f"trained with {next(iter(more))}"):
        merge_adapters(model, ["default"])
    assert list(model.peft_config) == ["default"]
