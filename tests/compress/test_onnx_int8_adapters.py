"""A shrunk model goes where others go: into ONNX, into int8, and under an adapter."""

import copy
import warnings

import numpy as np
import pytest
import torch
from tiny_models import sentence_model
from torch import nn

from fullrank.compress import (
    FractionOfBreakEven,
    LowRankLinear,
    factorize,
    make_plan,
    quantize_int8,
    quantize_onnx,
)
from fullrank.core.errors import InputError


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


needs_kernels = pytest.mark.skipif(
    set(torch.backends.quantized.supported_engines) <= {"none"},
    reason="this build of torch has no int8 kernels",
)


@needs_kernels
def test_both_factors_are_quantised_and_the_model_is_left_alone():
    model, x = shrunk(), images()
    before = copy.deepcopy(model.state_dict())
    small = quantize_int8(model)
    kinds = [type(m).__module__ for m in small.modules() if type(m).__name__ == "Linear"]
    factors = 2 * sum(isinstance(m, LowRankLinear) for m in model.modules())
    assert factors > 0
    assert len(kinds) == factors + sum(type(m) is nn.Linear for m in model.modules())
    assert all("quantized" in kind for kind in kinds)
    error = (small(x) - model(x)).norm() / model(x).norm()
    assert 0 < error < 0.05
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    # PyTorch's own function sees no factor.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    assert any(isinstance(m, LowRankLinear) for m in plain.modules())


@needs_kernels
def test_dense_layers_may_be_left_in_float32():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    factorize(model, make_plan(model, FractionOfBreakEven(0.5), include="0"))
    small = quantize_int8(model, dense=False)
    assert type(small[2]) is nn.Linear
    assert "quantized" in type(small[0].first).__module__


@needs_kernels
def test_models_that_look_at_a_layers_weight_take_int8():
    """T5 asks for its layers' dtype before it calls them."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=50, **sizes)).eval()
    factorize(model, make_plan(model, FractionOfBreakEven(0.5)))
    ids, small = torch.arange(2, 18).reshape(2, 8), quantize_int8(model)
    wanted, found = model(ids)[0], small(ids)[0]
    assert (found - wanted).norm() < 0.1 * wanted.norm()
    pairs = [m for m in small.modules() if type(m).__name__ == "LinearPair"]
    merged = pairs[0].weight()
    assert merged.shape == (pairs[0].out_features, pairs[0].in_features)


@needs_kernels
def test_int8_refuses_what_it_cannot_do():
    with pytest.raises(InputError, match="no linear layer"):
        quantize_int8(nn.Sequential(nn.Conv2d(1, 1, 1)))
    with pytest.raises(InputError, match="float32 on the CPU"):
        quantize_int8(nn.Linear(4, 4, dtype=torch.bfloat16))


@needs_kernels
def test_an_encoder_in_int8_and_in_onnx(tmp_path):
    """The same sentences, close embeddings: PyTorch's kernels, and onnxruntime's."""
    runtime = pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    encoder = sentence_model(tmp_path / "bert")
    factorize(encoder, make_plan(encoder, FractionOfBreakEven(0.7)))
    texts = ["the rank of a matrix", "cat dog bird", "red fish , blue fish ."]
    wanted = encoder.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    small = quantize_int8(encoder)
    found = small.encode(texts, convert_to_tensor=True, normalize_embeddings=True)
    assert 0.99 < (found * wanted).sum(1).min() < 1

    bert = encoder[0].auto_model
    inputs = encoder.preprocess(texts)
    names = ("input_ids", "attention_mask")
    given = tuple(inputs[name] for name in names)
    file = tmp_path / "bert.onnx"
    batch = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("length", min=2, max=64)}
    torch.onnx.export(
        bert, given, file, dynamo=True, dynamic_shapes=(batch, batch), verbose=False,
        input_names=list(names),
    )  # fmt: skip
    eight = quantize_onnx(file, tmp_path / "int8.onnx")
    products = [n for n in onnx.load(eight).graph.node if n.op_type == "MatMulInteger"]
    linear = sum(type(m) is nn.Linear for m in bert.modules())
    pairs = sum(isinstance(m, LowRankLinear) for m in bert.modules())
    # The pooler's output is not asked for by anyone here, but it is exported.
    assert len(products) == 2 * pairs + linear
    outputs = []
    for path in (file, eight):
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        feed = {name: inputs[name].numpy() for name in names}
        outputs.append(session.run(None, feed)[0])
    plain = bert(**{name: inputs[name] for name in names}).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(outputs[0], plain, rtol=1e-3, atol=1e-4)
    error = np.linalg.norm(outputs[1] - plain) / np.linalg.norm(plain)
    assert 0 < error < 0.1


def test_onnx_files_that_are_not_there_or_one(tmp_path):
    with pytest.raises(InputError, match="no exported model"):
        quantize_onnx(tmp_path / "a.onnx", tmp_path / "b.onnx")
    file = tmp_path / "a.onnx"
    file.write_bytes(b"")
    with pytest.raises(InputError, match="another file"):
        quantize_onnx(file, file)


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
