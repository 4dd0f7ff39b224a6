"""Which layers are taken: subclasses, normalised weights, names that look like a wrapper's."""

import warnings

import pytest
import torch
from torch import nn

from fullrank.compress import (
    TRP,
    LoRDConfig,
    LowRankLinear,
    Maestro,
    factorisable,
    greenformers,
    load,
    lord_compress,
    pela_compress,
    report,
    save,
)
from fullrank.compress.training_targets import training_targets
from fullrank.core.errors import InputError


class Plain(nn.Linear):
    """Adds nothing to what is computed."""

    def __repr__(self):
        return "Plain()"


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_subclasses_that_inherit_forward_are_taken_and_others_named():
    model = nn.Sequential(Plain(16, 16), Scaled(16, 16), nn.Linear(16, 16), nn.LazyLinear(4))
    with pytest.warns(UserWarning, match=r"1 layers are left out, e\.g\. 1: a Scaled"):
        assert list(factorisable(model)) == ["0", "2"]
    with pytest.warns(UserWarning, match="Scaled"):
        assert list(training_targets(model)) == ["0", "2"]


def test_falcons_linear_layers_are_taken():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_hidden_layers": 1, "hidden_size": 64, "num_attention_heads": 2}
    model = transformers.FalconModel(transformers.FalconConfig(vocab_size=50, **sizes)).eval()
    ids = torch.arange(2, 18).reshape(2, 8)
    small = greenformers(model, 0.99)
    assert sum(isinstance(m, LowRankLinear) for m in small.modules()) == 4
    assert (small(ids)[0] - model(ids)[0]).norm() < model(ids)[0].norm()


def test_attention_keeps_the_projection_that_it_does_not_call():
    model = nn.Transformer(32, 2, 1, 1, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert set(factorisable(model)) == {
            f"{part}.layers.0.linear{i}" for part in ("encoder", "decoder") for i in (1, 2)
        }
    # "*head*" is one of the default patterns, and matches none of these.
    small = pela_compress(model)
    assert sum(isinstance(m, LowRankLinear) for m in small.modules()) == 4


def test_weights_that_are_made_anew_at_every_step_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normalised = [
            nn.utils.weight_norm(layer) for layer in (nn.Linear(32, 32), nn.Conv2d(8, 8, 3))
        ]
    model = nn.Sequential(nn.Conv2d(1, 8, 3), *normalised, nn.Conv2d(8, 8, 3), nn.Linear(8, 8))
    assert list(factorisable(model)) == ["0", "3", "4"]
    assert list(TRP(model).layers) == ["3"]
    assert list(Maestro(model).layers) == ["0", "3", "4"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))

    def forward(self, x):
        return self.model(x)


def test_attributes_named_as_a_wrappers_are_hide_no_layer(tmp_path):
    def model():
        return nn.Sequential(Net(), nn.Linear(32, 32))

    names = ["0.model.0", "0.model.1", "1"]
    assert list(Maestro(model()).layers) == names
    small = greenformers(model(), 0.5)
    assert [row[0] for row in report(small).rows] == names
    save(small, tmp_path / "small")
    again = load(tmp_path / "small", model())
    x = torch.randn(3, 32)
    assert torch.equal(again(x), small(x))
    # Where nothing clashes they are a wrapper's.
    small = greenformers(nn.Sequential(Net()), 0.5)
    assert [row[0] for row in report(small).rows] == ["0", "1"]


def test_a_bare_layer_cannot_be_replaced_in_place():
    for shrink in (
        lambda layer: greenformers(layer, 0.5),
        lambda layer: lord_compress(layer, [torch.randn(400, 64)], LoRDConfig(budget=0.5)),
        Maestro,
    ):
        with pytest.raises(InputError, match="wrap it"):
            shrink(nn.Linear(64, 64))


def test_a_model_is_saved_into_the_present_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = greenformers(nn.Sequential(nn.Linear(16, 16)), 0.5)
    save(model, ".")
    again = load(tmp_path, into=nn.Sequential(nn.Linear(16, 16)))
    assert torch.equal(again[0].first, model[0].first)
