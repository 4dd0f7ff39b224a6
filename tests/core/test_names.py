"""One name for a module, whatever wraps the model."""

import pytest
import torch
from torch import nn

from fullrank.core import canonical_name, model_fingerprint, named_linears
from fullrank.spectra import xray


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("encoder.layer.3.output.dense", "encoder.layer.3.output.dense"),
        ("0.auto_model.encoder.layer.3.output.dense", "encoder.layer.3.output.dense"),
        ("0.model.layers.1.fc", "layers.1.fc"),
        ("module.0.auto_model.pooler.dense", "pooler.dense"),
        ("_orig_mod.module.lm.fc", "lm.fc"),
        ("module._orig_mod.lm.fc", "lm.fc"),
        ("base_model.model.lm.q_proj.base_layer.weight", "lm.q_proj.weight"),
        ("base_model.model.0.auto_model.q.base_layer", "q"),
        ("_fsdp_wrapped_module.layer.0._fsdp_wrapped_module.fc", "layer.0.fc"),
        ("layer.0._checkpoint_wrapped_module.fc.weight", "layer.0.fc.weight"),
        # What only looks like a wrapper stays.
        ("layer.module.fc", "layer.module.fc"),
        ("my_orig_mod.fc", "my_orig_mod.fc"),
        ("1.model.fc", "1.model.fc"),
        ("base_layers.fc", "base_layers.fc"),
        ("0.fc", "0.fc"),
        ("", ""),
    ],
)
def test_what_wrappers_add_is_stripped(name, canonical):
    assert canonical_name(name) == canonical
    assert canonical_name(canonical) == canonical


class Tied(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.one = nn.Linear(width, width)
        self.two = nn.Linear(width, width)
        self.two.weight = self.one.weight
        self.inner = nn.Sequential(nn.Linear(width, 2), nn.LayerNorm(2))


def test_linears_are_found_once():
    assert [name for name, _ in named_linears(Tied())] == ["one", "inner.0"]


def test_weights_that_are_computed_are_told_apart():
    layers = (nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)) for _ in range(12))
    model = nn.Sequential(*layers, nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)))
    assert len(list(named_linears(model))) == 13
    assert len(xray(model)) == 13


def test_wrapping_changes_neither_names_nor_fingerprint():
    model = Tied()
    wrapped = nn.Module()
    wrapped.module = torch.compile(model)
    assert dict(named_linears(wrapped)) == dict(named_linears(model))
    assert model_fingerprint(wrapped) == model_fingerprint(model)


def test_the_fingerprint_sees_shapes_and_names_not_values():
    first = model_fingerprint(Tied())
    assert first == model_fingerprint(Tied())
    assert len(first) == 16
    assert first != model_fingerprint(Tied(5))
    renamed = Tied()
    renamed.other = renamed.inner
    del renamed.inner
    assert first != model_fingerprint(renamed)


def test_where_two_would_have_one_name_prefixes_stay():
    inner = nn.ModuleDict({"model": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    assert [name for name, _ in named_linears(nn.Sequential(inner))] == ["0", "1"]
    both = nn.Sequential(inner, nn.Linear(4, 4))
    assert [name for name, _ in named_linears(both)] == ["0.model.0", "0.model.1", "1"]
