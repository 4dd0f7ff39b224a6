"""A shrunk model goes where others go: into ONNX, into int8, and under an adapter."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.compress import FractionOfBreakEven, LowRankLinear, factorize, make_plan


def shrunk():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 64),
        nn.GELU(),
        nn.Linear(64, 10),
    ).eval()
    return factorize(model, make_plan(model, FractionOfBreakEven(0.5)))


def images(count=5):
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_onnxruntime_gives_equal_outputs(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = shrunk(), images()
    batch = {0: torch.export.Dim("batch", min=2)}
    file = tmp_path / "model.onnx"
    torch.onnx.export(model, (x,), file, dynamo=True, dynamic_shapes=(batch,), verbose=False)
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    for sample in (x, images(3)):
        (found,) = session.run(None, {session.get_inputs()[0].name: sample.numpy()})
        np.testing.assert_allclose(found, model(sample).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dynamic_int8_of_the_dense_form_of_the_factors():
    """`quantize_dynamic` takes nn.Linear: a factorised layer as two of them."""
    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("this build of torch has no int8 kernels")
    model, x = shrunk(), images()
    pairs = copy.deepcopy(model)
    for name, layer in model.named_children():
        if isinstance(layer, LowRankLinear):
            pairs._modules[name] = as_pair(layer)
    torch.testing.assert_close(pairs(x), model(x))
    small = torch.ao.quantization.quantize_dynamic(pairs, {nn.Linear}, torch.qint8)
    error = (small(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.05


def as_pair(layer):
    first = nn.Linear(layer.in_features, layer.rank, bias=False)
    second = nn.Linear(layer.rank, layer.out_features, bias=layer.bias is not None)
    first.weight, second.weight = layer.first, layer.second
    if layer.bias is not None:
        second.bias = layer.bias
    return nn.Sequential(first, second)


def test_lora_on_a_factorised_layer(tmp_path):
    peft = pytest.importorskip("peft")
    from peft.tuners.lora import Linear as LoraLinear

    model, x = shrunk(), images()
    config = peft.LoraConfig(r=2, target_modules=["3"], init_lora_weights=False)
    config._register_custom_module({LowRankLinear: LoraLinear})
    base = model(x)
    frozen = {n: p.clone() for n, p in model.named_parameters()}
    tuned = peft.get_peft_model(copy.deepcopy(model), config)
    assert not torch.allclose(tuned(x), base)
    optimizer = torch.optim.SGD([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    tuned(x).square().mean().backward()
    optimizer.step()
    layer = tuned.base_model.model[3]
    assert torch.equal(layer.base_layer.first, frozen["3.first"])
    assert layer.lora_B["default"].weight.grad.abs().sum() > 0
    with tuned.disable_adapter():
        torch.testing.assert_close(tuned(x), base)
