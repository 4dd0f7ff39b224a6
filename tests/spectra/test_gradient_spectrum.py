"""Gradient spectra: the official numbers, both routes, and a model that is left as it was."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from fullrank.core.errors import InputError  # noqa: E402
from fullrank.spectra.fused_projections import parts_of  # noqa: E402
from fullrank.spectra.gradient_cosines import gradient_cosines, mean_cosines  # noqa: E402
from fullrank.spectra.gradient_spectrum import (  # noqa: E402
    example_gradients,
    gradient_spectrum,
    mean_loss,
)

VECTORS = sorted((Path(__file__).parents[1] / "reference" / "gradient-quality").glob("*.npz"))
SQUARE = r"self_attn|mlp"


def load(path):
    arrays = np.load(path)
    config = json.loads(str(arrays["config"]))
    keys = {k: v for k, v in config.items() if k != "max_length"}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**keys, attn_implementation="eager")
    ).double()
    weights = {k[2:]: torch.tensor(arrays[k]) for k in arrays.files if k.startswith("w:")}
    model.load_state_dict(weights)
    return model, arrays


def sample(arrays, i):
    ids = torch.tensor(arrays[f"ids{i}"])
    labels = ids.clone()
    labels[: int(arrays[f"start{i}"])] = -100
    return ids, labels


def samples_in(arrays):
    return range(sum(k.startswith("ids") for k in arrays.files))


@pytest.mark.parametrize("method", ["auto", "grad", "factored"])
@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_the_official_numbers(path, method):
    model, arrays = load(path)
    for i in samples_in(arrays):
        (found,) = example_gradients(model, *sample(arrays, i), SQUARE, method)
        assert found.loss == pytest.approx(float(arrays[f"loss{i}"]), rel=1e-10)
        keys = [k for k in arrays.files if k.startswith(f"s{i}:")]
        assert keys
        for key in keys:
            expected = np.sort(arrays[key])[::-1]
            values = found.spectra[key.split(":")[1].removesuffix(".weight")].values
            assert len(values) == len(expected)
            np.testing.assert_allclose(values, expected, rtol=1e-8, atol=1e-10 * expected[0])


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_means_by_layer_and_projection(path):
    model, arrays = load(path)
    found = [example_gradients(model, *sample(arrays, i))[0].spectra for i in samples_in(arrays)]
    for row, part in enumerate("qkvo"):
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.{part}_proj"
            ranks = [spectra[name].effective_rank for spectra in found]
            norms = [spectra[name].nuclear_norm for spectra in found]
            expected = arrays["avg_erank_qkvo_by_layer"][row, layer]
            assert np.mean(ranks) == pytest.approx(expected, rel=1e-8)
            expected = arrays["avg_nuclear_qkvo_by_layer"][row, layer]
            assert np.mean(norms) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_the_official_cosines(path):
    model, arrays = load(path)
    found = [gradient_cosines(model, *sample(arrays, i))[0] for i in samples_in(arrays)]
    for i, one in enumerate(found):
        for part in "qkvo":
            expected = arrays[f"cos{i}:{part}_proj"][0, 1]
            cosine = one.adjacent[f"self_attn.{part}_proj"][0]
            assert cosine == pytest.approx(expected, abs=1e-6)
        for column, pair in enumerate(("q, o", "k, v")):
            expected = arrays[f"cosqkvo{i}"][:, column]
            assert [*one.same_layer[pair].values()] == pytest.approx(expected, abs=1e-6)
    mean = mean_cosines(found)
    adjacent = [[*layers.values()] for layers in mean.adjacent.values()]
    np.testing.assert_allclose(adjacent, arrays["avg_adjacent_cos_qkvo"], atol=1e-6)
    same = [[*mean.same_layer[pair].values()] for pair in ("q, o", "k, v")]
    np.testing.assert_allclose(same, arrays["avg_same_layer_cos_qo_kv"], atol=1e-6)


def test_vectors_are_there():
    assert len(VECTORS) == 2


def batch(arrays):
    rows = [sample(arrays, i) for i in samples_in(arrays)]
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for row, (one, wanted) in enumerate(rows):
        ids[row, : len(one)], labels[row, : len(one)], mask[row, : len(one)] = one, wanted, 1
    return rows, ids, labels, mask


def test_a_padded_batch_gives_each_examples_own_spectra():
    model, arrays = load(VECTORS[0])
    rows, ids, labels, mask = batch(arrays)
    together = example_gradients(model, ids, labels, attention_mask=mask)
    for (one, wanted), found in zip(rows, together, strict=True):
        (alone,) = example_gradients(model, one, wanted)
        assert found.loss == pytest.approx(alone.loss, rel=1e-6)
        assert found.tokens == alone.tokens == int((wanted[1:] != -100).sum())
        for name, spectrum in alone.spectra.items():
            np.testing.assert_allclose(
                found.spectra[name].values, spectrum.values, rtol=1e-6, atol=1e-9
            )


def test_arrays_will_do():
    model, arrays = load(VECTORS[0])
    ids, labels = sample(arrays, 0)
    found = gradient_spectrum(model, ids.numpy(), labels.numpy())
    assert found == gradient_spectrum(model, ids, labels)


def test_the_batchs_own_gradient():
    model, arrays = load(VECTORS[0])
    _, ids, labels, mask = batch(arrays)
    found = gradient_spectrum(model, ids, labels, attention_mask=mask)
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    for name, spectrum in found.items():
        gradient = model.get_submodule(name).weight.grad
        np.testing.assert_allclose(
            spectrum.values, torch.linalg.svdvals(gradient).numpy(), rtol=1e-8, atol=1e-12
        )


@pytest.mark.parametrize("method", ["factored", "grad"])
def test_a_weight_that_is_used_several_times_has_one_gradient(method):
    model, arrays = load(VECTORS[0])
    first, second = model.model.layers[:2]
    second.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    second.self_attn.v_proj = first.self_attn.v_proj
    _, ids, labels, mask = batch(arrays)
    found = gradient_spectrum(model, ids, labels, method=method, attention_mask=mask)
    assert not any(name in found for name in ("model.layers.1.self_attn.q_proj",))
    model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
    for name, spectrum in found.items():
        gradient = model.get_submodule(name).weight.grad
        np.testing.assert_allclose(
            spectrum.values, torch.linalg.svdvals(gradient).numpy(), rtol=1e-7, atol=1e-9
        )


def test_a_use_for_all_examples_at_once():
    class Relative(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.places = torch.nn.Embedding(20, 8), torch.nn.Embedding(6, 8)
            self.attn = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(8, 8)})
            self.head = torch.nn.Linear(8, 20)

        def forward(self, input_ids, **_):
            q_proj = self.attn["q_proj"]
            x = q_proj(self.words(input_ids)) + q_proj(self.places.weight[None, :5])
            return transformers.modeling_outputs.CausalLMOutput(logits=self.head(x.tanh()))

    torch.manual_seed(0)
    model = Relative()
    ids = torch.randint(0, 20, (3, 5))
    found = gradient_spectrum(model, ids, ids)
    mean_loss(model(ids).logits, ids).backward()
    expected = torch.linalg.svdvals(model.attn["q_proj"].weight.grad)
    np.testing.assert_allclose(found["attn.q_proj"].values, expected.numpy(), rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="for all examples at once"):
        example_gradients(model, ids, ids)


def test_layers_that_read_parts_of_one_tensor():
    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.words = torch.nn.Embedding(20, 8)
            self.attn = torch.nn.ModuleDict(
                {"k_proj": torch.nn.Linear(4, 8), "q_proj": torch.nn.Linear(8, 8)}
            )
            self.head = torch.nn.Linear(8, 20)

        def forward(self, input_ids, **_):
            x = self.words(input_ids)
            mixed = self.attn["q_proj"](x) * self.attn["k_proj"](x[..., :4])
            return transformers.modeling_outputs.CausalLMOutput(logits=self.head(mixed))

    torch.manual_seed(0)
    model = Parts()
    ids = torch.randint(0, 20, (1, 5))
    found = gradient_spectrum(model, ids, ids)
    mean_loss(model(ids).logits, ids).backward()
    for name, spectrum in found.items():
        expected = torch.linalg.svdvals(model.get_submodule(name).weight.grad)
        np.testing.assert_allclose(spectrum.values, expected.numpy(), rtol=1e-4, atol=1e-6)


def test_the_model_is_left_as_it_was():
    model, arrays = load(VECTORS[0])
    model.train()
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    before = copy.deepcopy(model)
    given = {name: p.grad for name, p in model.named_parameters()}
    gradient_spectrum(model, *sample(arrays, 0))
    for (name, p), q in zip(model.named_parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q), name
        assert p.requires_grad == q.requires_grad
        assert p.grad is given[name]
    for m, n in zip(model.modules(), before.modules(), strict=True):
        assert m.training == n.training
        assert not m._forward_hooks


@pytest.mark.parametrize("wrapped", ["frozen", "lora", "adalora"])
def test_frozen_weights_and_adapters(wrapped):
    model, arrays = load(VECTORS[0])
    expected = gradient_spectrum(model, *sample(arrays, 0))
    if wrapped == "frozen":
        model.requires_grad_(False)
    else:
        peft = pytest.importorskip("peft")
        targets = ["q_proj", "v_proj"]
        config = peft.LoraConfig(r=2, target_modules=targets)
        if wrapped == "adalora":  # adds to the layer's output in place
            config = peft.AdaLoraConfig(total_step=9, init_r=2, target_modules=targets)
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    found = gradient_spectrum(model, *sample(arrays, 0))
    assert found.keys() == expected.keys()
    for name, spectrum in found.items():
        np.testing.assert_allclose(spectrum.values, expected[name].values, rtol=1e-8, atol=1e-12)


def test_fused_projections_count_apart():
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2, attn_pdrop=0.0
    )
    model = transformers.GPT2LMHeadModel(config).double()
    ids = torch.arange(10)
    found = gradient_spectrum(model, ids, ids)
    model.eval()(input_ids=ids[None], labels=ids[None]).loss.backward()
    gradient = model.transformer.h[0].attn.c_attn.weight.grad  # (in, out)
    for number, part in enumerate("qkv"):
        own = torch.linalg.svdvals(gradient[:, 8 * number : 8 * number + 8]).numpy()
        np.testing.assert_allclose(
            found[f"transformer.h.0.attn.c_attn[{part}]"].values, own, rtol=1e-8, atol=1e-12
        )
    assert "transformer.h.0.attn.c_proj" in found


def rows_by_head(out, heads, per_block=3, blocks=None):
    """Row numbers as the models' code views them: blocks of heads, of which key, value are last."""
    view = torch.arange(out).view(blocks or heads, per_block, -1)
    return [view[:, :-2].flatten(), view[:, -2].flatten(), view[:, -1].flatten()]


@pytest.mark.parametrize(
    ("kind", "options", "rows"),
    [
        ("gpt_neox", {}, rows_by_head(48, 4)),
        ("bloom", {}, rows_by_head(48, 4)),
        ("falcon", {"multi_query": False, "alibi": True}, rows_by_head(48, 4)),
        ("falcon", {"alibi": True}, [torch.arange(i, j) for i, j in ((0, 16), (16, 20), (20, 24))]),
        (
            "falcon",
            {"new_decoder_architecture": True, "num_kv_heads": 2},
            rows_by_head(32, 4, 4, 2),
        ),
        ("gpt_bigcode", {"multi_query": False}, rows_by_head(48, 4)),
        ("codegen", {"rotary_dim": 4}, [rows_by_head(48, 4)[i] for i in (0, 2, 1)]),
    ],
)
def test_fused_projections_of_many_layouts(kind, options, rows):
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"intermediate_size": 24} if kind == "gpt_neox" else {}
    config = transformers.AutoConfig.for_model(kind, vocab_size=32, **shape, **options)
    model = transformers.AutoModelForCausalLM.from_config(config).double().eval()
    ids = torch.arange(10)
    found = gradient_spectrum(model, ids, ids)
    model(input_ids=ids[None], labels=ids[None]).loss.backward()
    (name,) = {n.removesuffix("[q]") for n in found if n.endswith("[q]")}
    weight = model.get_submodule(name).weight
    gradient = weight.grad if weight.shape[1] == 16 else weight.grad.T
    for part, own in zip("qkv", rows, strict=True):
        expected = torch.linalg.svdvals(gradient[own]).numpy()
        values = found[f"{name}[{part}]"].values
        np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-10)


def test_a_fused_layer_of_unknown_layout_is_one_part():
    layer, config = torch.nn.Linear(16, 24), transformers.PretrainedConfig()
    assert list(parts_of("attn.query_key_value", layer, config)) == ["attn.query_key_value"]


def test_fewer_keys_than_queries_in_one_layer():
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=1)
    parts = parts_of("layers.0.self_attn.qkv_proj", torch.nn.Linear(16, 24), config)
    assert [(p.start, p.stop) for p in parts.values()] == [(0, 16), (16, 20), (20, 24)]


def test_bfloat16_is_measured_in_float32():
    model, arrays = load(VECTORS[0])
    exact = gradient_spectrum(model, *sample(arrays, 1))
    rough = gradient_spectrum(model.bfloat16(), *sample(arrays, 1))
    for name, spectrum in exact.items():
        assert rough[name].nuclear_norm == pytest.approx(spectrum.nuclear_norm, rel=0.2)


def test_cosines_do_not_depend_on_the_company():
    model, arrays = load(VECTORS[0])
    rows, ids, labels, mask = batch(arrays)
    together = gradient_cosines(model, ids, labels, attention_mask=mask)
    for (one, wanted), found in zip(rows, together, strict=True):
        (alone,) = gradient_cosines(model, one, wanted)
        for kind in ("adjacent", "same_layer"):
            expected = {n: dict(v) for n, v in getattr(alone, kind).items()}
            assert expected
            for name, layers in getattr(found, kind).items():
                assert layers == pytest.approx(expected.pop(name), abs=1e-6)
            assert not expected


def test_one_scored_token_has_gradients_of_rank_one_in_the_last_layer():
    model, arrays = load(VECTORS[0])
    ids, _ = sample(arrays, 0)
    labels = torch.full_like(ids, -100)
    labels[-1] = ids[-1]
    found = gradient_spectrum(model, ids, labels)
    assert found["model.layers.1.self_attn.o_proj"].effective_rank == pytest.approx(1, abs=1e-6)


def test_bad_input():
    model, arrays = load(VECTORS[0])
    ids, labels = sample(arrays, 0)
    with pytest.raises(InputError, match="no token is scored"):
        gradient_spectrum(model, ids, torch.full_like(labels, -100))
    both = torch.stack([labels, torch.full_like(labels, -100)])
    with pytest.raises(InputError, match="no token is scored"):
        example_gradients(model, torch.stack([ids, ids]), both)
    with pytest.raises(InputError, match="differ"):
        gradient_spectrum(model, ids, labels[1:])
    with pytest.raises(InputError, match=r"no linear layer matches .*q_proj"):
        gradient_spectrum(model, ids, labels, "nowhere")
    for options, message in (({"method": "bogus"}, "method="), ({"modules": "("}, "modules=")):
        with pytest.raises(InputError, match=message):
            gradient_spectrum(model, ids, labels, **options)
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        gradient_spectrum(model, ids, labels)
    with torch.no_grad():
        model.model.embed_tokens.weight[int(ids[0])] = float("nan")
    with pytest.raises(InputError, match="not finite"):
        gradient_spectrum(model, ids, labels)
    assert all(p.requires_grad for p in model.parameters())
