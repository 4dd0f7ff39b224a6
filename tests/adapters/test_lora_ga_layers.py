"""LoRA-GA on layers that share weights, beside other adapters, from one's own backward passes."""

import copy

import pytest
import torch
from cases import batches, loss_of
from small_net import TARGETS, net, samples
from torch import nn

from fullrank.adapters import lora_ga
from fullrank.core.errors import InputError

peft = pytest.importorskip("peft")


def config(**changes):
    options = {"r": 2, "lora_alpha": 4, "target_modules": TARGETS, "use_rslora": True}
    return peft.LoraConfig(**{**options, **changes})


def tuned(model=None, settings=None, data=None, **options):
    options = {"n_batches": 3, "loss_fn": loss_of, "progress": False, **options}
    return lora_ga.initialize(
        model or net(), batches() if data is None else data, settings or config(), **options
    )


def shaken(model, adapter):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f".{adapter}." in name:
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model


IDS = samples()["ids"]


class Tied(nn.Module):
    """Two layers of one weight, and a head that is the embedding's."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 12)
        self.a, self.b, self.c = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)
        self.b.weight = self.a.weight
        self.head = nn.Linear(12, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids, labels=None):
        logits = self.head(self.c(self.b(self.a(self.embed(ids)).tanh()).tanh()))
        if labels is None:
            return logits
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}


class Twice(Tied):
    """One layer under two names, of which PEFT adapts the first."""

    def __init__(self):
        super().__init__()
        self.b = self.a


@pytest.mark.parametrize(
    ("kind", "targets"),
    [(Tied, ["a", "b"]), (Tied, ["a", "c"]), (Tied, ["head"]), (Twice, ["a"])],
)
def test_a_shared_weight_is_not_changed_for_others(kind, targets):
    before = {name: t.clone() for name, t in kind().state_dict().items()}
    model = kind()
    with pytest.raises(InputError, match="shares its weight with another module"):
        tuned(model, config(target_modules=targets))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    kept = tuned(model, config(target_modules=targets), mode="subtract_init")
    torch.testing.assert_close(kept(IDS), kind()(IDS), rtol=1e-5, atol=1e-5)


def test_layers_of_one_weight_start_from_the_sum_of_its_uses():
    model = tuned(Tied(), config(target_modules=["a", "b"]), mode="subtract_init")
    layers = model.base_model.model
    starts = [getattr(layers, name).lora_A["default"].weight for name in ("a", "b")]
    assert torch.equal(*starts)


def test_a_step_of_ones_own_gives_the_same_start():
    base = net()

    def step():
        for batch in batches():
            base(**batch)["loss"].backward()

    model, expected = tuned(base, data=step), tuned()
    state = expected.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name])
    assert model.lora_ga.batches == expected.lora_ga.batches == 3
    with pytest.raises(InputError, match="no backward pass"):
        tuned(data=lambda: None)


@pytest.mark.parametrize("mode", ["residual", "subtract_init"])
def test_gradients_are_taken_in_training_mode_and_depend_on_the_seed(mode):
    def start(seed, train):
        base = net()
        base.tall = nn.Sequential(nn.Dropout(0.5), base.tall)
        model = tuned(base.train(train), config(target_modules=["wide"]), mode=mode, seed=seed)
        assert base.training is train
        return model.base_model.model.wide.lora_A["default"].weight

    torch.manual_seed(5)
    first = start(0, train=True)
    assert torch.equal(start(0, train=False), first)
    assert not torch.equal(start(1, train=False), first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "all"}, "bias='all'"),
        ({"lora_bias": True}, "lora_bias=True"),
        ({"use_dora": True}, "use_dora=True"),
        ({"trainable_token_indices": {"embed": [1]}}, "trainable_token_indices"),
        ({"target_modules": ["wide", "embed"]}, "embed is a Embedding"),
    ],
)
def test_what_the_files_would_not_hold_is_refused(changes, message):
    model = net()
    with pytest.raises(InputError, match=message):
        tuned(model, config(**changes))
    assert not hasattr(model, "peft_config")
    assert isinstance(model.wide, nn.Linear)
    assert isinstance(model.embed, nn.Embedding)


def test_another_initialisation_in_the_configuration_is_not_looked_at():
    settings = config(init_lora_weights="lora_ga", lora_ga_config=peft.LoraGAConfig())
    torch.testing.assert_close(tuned(settings=settings)(IDS), net()(IDS), rtol=1e-5, atol=1e-5)
    assert settings.init_lora_weights == "lora_ga"


def test_a_lowered_rank_keeps_its_dropout():
    with pytest.warns(UserWarning, match="lowered"):
        model = tuned(settings=config(r=8, lora_dropout=0.5))
    assert model.base_model.model.tall.lora_dropout["default"].p == 0.5


@pytest.mark.parametrize("mode", ["residual", "subtract_init"])
def test_other_adapters_stand_on_the_base_and_are_saved(mode, tmp_path):
    model = tuned(mode=mode)
    model.add_adapter("other", config())
    shaken(model, "other")
    model.set_adapter("other")
    lone = net()
    expected = peft.get_peft_model(lone, config(), adapter_name="other")
    expected.load_state_dict(
        {n: t for n, t in model.state_dict().items() if ".other." in n}, strict=False
    )
    torch.testing.assert_close(model(IDS), expected(IDS), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "both")
    assert (tmp_path / "both" / "adapter_model.safetensors").is_file()
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "both" / "other")
    torch.testing.assert_close(loaded(IDS), model(IDS), rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
    assert [path.name for path in (tmp_path / "one").iterdir() if path.is_dir()] == ["other"]
    assert not (tmp_path / "one" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("mode", ["residual", "subtract_init"])
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_the_base_comes_back(kind, mode):
    model = shaken(
        tuned(net(kind), mode=mode, settings=config(fan_in_fan_out=kind == "conv1d")), "default"
    )
    torch.testing.assert_close(model.unload()(IDS), net(kind)(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["residual", "subtract_init"])
@pytest.mark.parametrize("active", ["default", "other"])
def test_what_is_merged_is_on_the_base(active, mode):
    model = shaken(tuned(mode=mode), "default")
    model.add_adapter("other", config())
    shaken(model, "other").set_adapter(active)
    expected, twin = model(IDS), copy.deepcopy(model)
    torch.testing.assert_close(model.merge_and_unload()(IDS), expected, rtol=1e-5, atol=1e-5)
    twin.merge_adapter()
    torch.testing.assert_close(twin(IDS), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(twin.unload()(IDS), expected, rtol=1e-5, atol=1e-5)


def test_a_copy_loads_into_itself(tmp_path):
    model = tuned()
    peft.get_peft_model(net(), config()).save_pretrained(tmp_path)
    twin = copy.deepcopy(model)
    twin.load_adapter(tmp_path, "second")
    assert "second" in twin.peft_config
    assert "second" not in model.peft_config


def test_a_narrow_base_loses_nothing_to_the_subtraction():
    base, model = net(dtype=torch.bfloat16), tuned(net(dtype=torch.bfloat16), mode="subtract_init")
    x = base.embed(IDS)
    found, expected = model.base_model.model.wide(x).float(), base.wide(x).float()
    # Rounded with the start added, which is half a unit; a start rounded by itself is off by more.
    assert (found - expected).norm() < 2**-9 * expected.norm()
