"""The dense weight of a factorised layer: computed at use, at no cost when only asked about."""

import copy

import pytest
import torch
from torch import nn

from fullrank.compress import Fixed, LowRankConv2d, LowRankLinear, factorize, make_plan
from fullrank.core.errors import InputError

LAYERS = [
    LowRankLinear(6, 8, 2),
    LowRankLinear(6, 8, 2, transposed=True),
    LowRankConv2d(3, 8, 5, 2),
]


@pytest.fixture
def products(monkeypatch):
    """Layers whose factors were multiplied out."""
    found = []
    for cls in (LowRankLinear, LowRankConv2d):
        multiply = cls.merged_weight
        monkeypatch.setattr(cls, "merged_weight", lambda s, m=multiply: (found.append(s), m(s))[1])
    return found


@pytest.mark.parametrize("layer", LAYERS)
def test_asking_about_the_weight_computes_nothing_and_using_it_does(layer, products):
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    assert (weight.dtype, weight.device) == (torch.float32, torch.device("cpu"))
    assert weight.requires_grad
    assert weight.is_floating_point()
    shape, numel = weight.shape, weight.numel()
    assert not products
    plain = layer.merged_weight()
    plain = plain.T if getattr(layer, "transposed", False) else plain
    assert (shape, numel) == (plain.shape, plain.numel())
    assert torch.equal(weight, plain)
    assert type(2 * weight) is torch.Tensor
    products.clear()
    (found,) = torch.autograd.grad((layer.weight**2).sum(), layer.first)
    (wanted,) = torch.autograd.grad((plain**2).sum(), layer.first)
    assert torch.equal(found, wanted)
    assert len(products) == 1
    with torch.no_grad():
        assert not layer.weight.requires_grad
        assert not (1 * layer.weight).requires_grad


@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.data.add_(1),
        lambda layer: layer.weight.copy_(layer.weight),
        lambda layer: nn.init.zeros_(layer.weight),
        lambda layer: layer.weight.requires_grad_(False),
        lambda layer: setattr(layer.weight, "data", torch.zeros(8, 6)),
        lambda layer: layer.weight.__setitem__(0, 0.0),
        lambda layer: torch.add(layer.weight, 1, out=layer.weight),
    ],
)
def test_writing_to_the_weight_is_refused(write):
    with torch.no_grad(), pytest.raises(InputError, match="would be lost"):
        write(LowRankLinear(6, 8, 2))


def test_fast_paths_around_a_block_do_not_multiply_factors_out(products):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    dense = nn.TransformerEncoder(layer, 2).eval()
    small = factorize(copy.deepcopy(dense), make_plan(dense, Fixed(4)), progress=False)
    assert isinstance(small.layers[0].linear1, LowRankLinear)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        found = small(x)
    assert not products
    torch.testing.assert_close(found, small(x), rtol=1e-5, atol=1e-5)


def test_t5_asks_for_the_type_only_also_when_compiled(products):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1)
    model = transformers.T5EncoderModel(config).eval()
    factorize(model, make_plan(model, Fixed(4)), progress=False)
    block = model.encoder.block[0].layer[1]
    x = torch.randn(1, 5, 16)
    with torch.no_grad():
        wanted = block(x)
        assert not products
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), wanted)
