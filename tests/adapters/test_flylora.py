"""FlyLoRA as a tuner: what is its own beside the matrix of tests."""

import copy

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from cases import CASES, shaken, train, trained  # noqa: E402
from small_net import TARGETS, net, samples  # noqa: E402
from torch import nn  # noqa: E402

from fullrank.adapters import FlyLoraConfig, adapt, merge_adapters, to_lora  # noqa: E402
from fullrank.adapters.flylora_callback import FlyLoraCallback  # noqa: E402
from fullrank.adapters.flylora_layer import FlyLoraLinear  # noqa: E402
from fullrank.adapters.flylora_routing import rebalance  # noqa: E402
from fullrank.core.errors import InputError  # noqa: E402

IDS = samples()["ids"]


def tuned(r=4, k=1, **options):
    config = FlyLoraConfig(r=r, k=k, target_modules=TARGETS, **options)
    return peft.get_peft_model(net(), config)


def layer(model, name="wide"):
    return model.base_model.model.get_submodule(name)


def test_the_projection_is_drawn_from_the_seed_and_the_layers_name():
    one, same, other = tuned(), tuned(), tuned(seed=1)
    for name in TARGETS:
        A = layer(one, name).flylora_A["default"]
        assert torch.equal(A, layer(same, name).flylora_A["default"])
        assert not torch.equal(A, layer(other, name).flylora_A["default"])
        width = A.shape[1]
        assert ((A != 0).sum(1) == max(1, width // 4)).all()
    wide, tall = (layer(one, name).flylora_A["default"] for name in TARGETS)
    assert not torch.equal(wide, tall[:, : wide.shape[1]])


def test_a_smaller_rank_keeps_the_share_of_experts():
    model = tuned(r=8, k=4, rank_pattern={"tall": 4}, k_pattern={})
    assert layer(model, "tall").groups["default"] == [(4, 2)]
    model = tuned(r=8, k=4, rank_pattern={"tall": 4}, k_pattern={"tall": 3})
    assert layer(model, "tall").groups["default"] == [(4, 3)]


def test_only_training_counts_and_only_balancing_moves_d():
    model = tuned().eval()
    model(IDS)
    with torch.no_grad():
        model.train()(IDS)
    wide = layer(model)
    assert not wide.counts["default"].any()
    model(IDS)
    counts = wide.counts["default"].clone()
    assert counts.sum() == IDS.numel()
    assert not wide.flylora_d["default"].any()
    model.base_model.update_balance()
    expected = rebalance(torch.zeros(4), counts, 1e-3)
    assert torch.equal(wide.flylora_d["default"], expected)
    assert not wide.counts["default"].any()
    assert not any("flylora_d" in name or "flylora_A" in name for name in trained(model))


def test_padding_is_not_counted():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.wide = nn.Embedding(11, 12), nn.Linear(12, 20)

        def forward(self, ids, attention_mask=None):
            return self.wide(self.embed(ids))

    config = FlyLoraConfig(r=4, k=2, target_modules=["wide"])
    model = peft.get_peft_model(Masked(), config).train()
    mask = torch.ones_like(IDS)
    mask[:, 3:] = 0
    model(IDS, attention_mask=mask)
    assert layer(model).counts["default"].sum() == 2 * mask.sum()
    copied = copy.deepcopy(model)
    copied.base_model.update_balance()
    copied(IDS, attention_mask=mask)
    assert layer(copied).counts["default"].sum() == 2 * mask.sum()
    assert copied.base_model.padding is not model.base_model.padding
    model(IDS)  # no mask: all count
    assert layer(model).counts["default"].sum() == 2 * mask.sum() + 2 * IDS.numel()
    bare = model.unload()
    assert not bare._forward_pre_hooks


def test_the_trainer_balances_once_a_step(tmp_path):
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        remove_unused_columns=False,
    )
    rows = [{name: tensor[i] for name, tensor in samples().items()} for i in range(len(IDS))]
    model = tuned()
    transformers.Trainer(
        model, arguments, train_dataset=rows, callbacks=model.base_model.trainer_callbacks()
    ).train()
    steps = layer(model).flylora_d["default"].abs() / 1e-3
    assert steps.max() > 0.5
    assert steps.max() < 3.5
    assert isinstance(model.base_model.trainer_callbacks()[0], FlyLoraCallback)


def test_files_hold_d_and_the_projection(tmp_path):
    model = shaken(tuned())
    layer(model).flylora_d["default"].copy_(torch.tensor([0.5, -0.25, 0.125, 1.0]))
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert torch.equal(layer(again).flylora_d["default"], layer(model).flylora_d["default"])
    assert "import fullrank.adapters.flylora" in (tmp_path / "README.md").read_text()


def test_all_experts_are_an_ordinary_update_and_others_are_not_unless_asked_for():
    model = shaken(tuned(k=4))
    update = to_lora(model)["wide"]
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    added = layer(model)(x) - layer(model).base_layer(x)
    torch.testing.assert_close(x @ update.A.T @ update.B.T, added, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"wide: .*depends on the token"):
        to_lora(shaken(tuned(k=2)))
    rough = shaken(tuned(k=2, approximate=True))
    before = rough(IDS)
    merged = rough.merge_and_unload()
    assert not torch.allclose(merged(IDS), before, atol=1e-4)


@pytest.mark.parametrize("weights", [None, [1.0, 1.0], [0.25, 2.0]])
def test_merged_tasks_do_what_they_do_together(weights, tmp_path):
    model = shaken(tuned())
    model.add_adapter("b", FlyLoraConfig(r=3, k=2, seed=7, alpha=5.0, target_modules=["wide"]))
    model.set_adapter("b")
    shaken(model, seed=1)
    model.set_adapter("default")
    report = merge_adapters(model, ["default", "b"], weights)
    assert model.active_adapters == ["default"]
    assert {name: len(update.A) for name, update in report.updates.items()} == {
        "wide": 7,
        "tall": 4,
    }
    x = torch.randn(9, 12, generator=torch.Generator().manual_seed(0))
    wide, shares = layer(model), weights or [0.5, 0.5]
    plain = wide.base_layer(x)
    alone = []
    for name in ("default", "b"):
        model.set_adapter(name)
        alone.append(wide(x) - plain)
    model.set_adapter("merged")
    expected = sum(share * part for share, part in zip(shares, alone, strict=True))
    torch.testing.assert_close(wide(x) - plain, expected, rtol=1e-4, atol=1e-5)
    logits = model(IDS)
    model.save_pretrained(tmp_path, selected_adapters=["merged"])
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "merged")
    torch.testing.assert_close(again(IDS), logits, rtol=1e-5, atol=1e-6)
    # The tasks go on choosing, and balancing, among their own.
    model.train()(IDS)
    model.base_model.update_balance()
    assert len(wide.groups["merged"]) == 2


def test_merging_what_does_not_fit():
    model = tuned()
    model.add_adapter("signed", FlyLoraConfig(r=4, k=1, score="signed", target_modules=TARGETS))
    with pytest.raises(InputError, match="scores"):
        merge_adapters(model, ["default", "signed"])
    with pytest.raises(InputError, match="rank"):
        merge_adapters(model, ["default", "signed"], rank=2)
    assert set(model.peft_config) == {"default", "signed"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 5}, "k=5 experts of r=4"),
        ({"sparsity": 1.5}, "sparsity"),
        ({"bias_update_rate": float("nan")}, "bias_update_rate"),
        ({"score": "loud"}, "score"),
        ({"alpha": 0.0}, "alpha"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        FlyLoraConfig(**{"r": 4, "k": 1, **options})


def test_adapt_takes_a_quarter_of_the_experts():
    model = adapt(net(), "flylora", rank=8, targets=TARGETS)
    assert layer(model).groups["default"] == [(8, 2)]
    assert isinstance(layer(model), FlyLoraLinear)
    assert CASES["flylora"].method == "flylora"


def test_it_learns():
    model = tuned(r=8, k=4).train()
    first = float(model(**samples())["loss"])
    optimizer = train(model, 60)
    for _ in range(60):
        train(model, 1, optimizer)
        model.base_model.update_balance()
    assert float(model(**samples())["loss"]) < 0.95 * first


def test_a_k_of_its_own_is_kept_and_is_at_most_r():
    config = FlyLoraConfig(r=16, k=4, rank_pattern={"0": 8}, k_pattern={"0": 4})
    assert config.at("0").k == 4
    with pytest.raises(InputError, match="0: k=6 experts of r=4"):
        FlyLoraConfig(r=4, k=2, k_pattern={"0": 6}).at("0")
