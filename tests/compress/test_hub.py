"""Shrunk transformers and sentence-transformers models load where the dense ones did."""

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fullrank.compress import (
    Fixed,
    LoRDConfig,
    LowRankLinear,
    RankPlan,
    export_dense,
    factorize,
    load,
    lord_compress,
    make_plan,
    report,
    save,
)
from fullrank.compress.store import to_dense
from fullrank.core.errors import StoreError
from fullrank.core.plan import PlanEntry

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]


def bert(cls=None):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return (cls or transformers.BertModel)(config).eval()


def shrunk(model, rank=6):
    return factorize(model, make_plan(model, Fixed(rank)), progress=False)


def llama():
    """A model whose architecture has no biases, with factors that have."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    data = [{"input_ids": torch.randint(0, 50, (8, 16))} for _ in range(4)]
    lord_compress(model, data, LoRDConfig(budget=0.6, rank_multiple=4), progress=False)
    return model


def ids():
    return torch.arange(5, 17).reshape(2, 6)


def sentence_model(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    bert().save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    inner = Transformer(str(tmp_path / "bert"))
    return SentenceTransformer(modules=[inner, Pooling(32)], device="cpu")


def in_a_new_process(code, *arguments):
    result = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_dense_modules_of_sentence_transformers_stay_dense(tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    model = sentence_model(tmp_path)
    model.append(Dense(32, 32))
    plan = make_plan(model, Fixed(6))
    assert plan
    assert not any(name.startswith("2.") for name in plan)
    factorize(model, plan, progress=False)
    loaded = SentenceTransformer(str(save(model, tmp_path / "small")), device="cpu")
    assert (loaded.encode(["a b c"]) == model.encode(["a b c"])).all()
    model[2].linear = LowRankLinear(32, 32, 4)
    with pytest.raises(StoreError, match=r"2\.linear is outside"):
        save(model, tmp_path / "other")


LOAD_BOTH = """
import sys
import fullrank
from sentence_transformers import SentenceTransformer
from transformers import AutoModel
from safetensors.torch import load_file
import torch
folder, wanted, other = sys.argv[1:]
wanted = load_file(wanted)
model = AutoModel.from_pretrained(folder)
state = model.state_dict()
assert any(k.endswith(".first") for k in state), "nothing is factorised"
for key, value in wanted.items():
    if key != "embeddings!":
        assert torch.equal(state[key], value), key
st = SentenceTransformer(folder, device="cpu")
found = st.encode(["a b c", "d e f g h"], convert_to_tensor=True)
assert torch.equal(found, wanted["embeddings!"])
st.save_pretrained(other)
again = SentenceTransformer(other, device="cpu").encode(["a b c"], convert_to_tensor=True)
assert torch.allclose(again[0], found[0], atol=1e-6)
print("equal")
"""


def test_plain_loading_is_bit_equal_in_a_new_process(tmp_path):
    model = sentence_model(tmp_path)
    texts = ["a b c d", "e f g", "h i j k l m", "n o p q r s t u", "v w x y z"] * 8
    lord_compress(model, texts, LoRDConfig(budget=0.6), progress=False)
    wanted = {k: v.clone() for k, v in model[0].auto_model.state_dict().items()}
    wanted["embeddings!"] = model.encode(["a b c", "d e f g h"], convert_to_tensor=True)
    save_file(wanted, tmp_path / "wanted.safetensors")
    folder = save(model, tmp_path / "small")
    assert not list(folder.rglob("*.bin"))
    assert not list(folder.rglob("*.py"))
    arguments = (folder, tmp_path / "wanted.safetensors", tmp_path / "again")
    assert "equal" in in_a_new_process(LOAD_BOTH, *arguments)


def test_load_finds_the_class_and_the_report_survives(tmp_path):
    model = shrunk(bert(transformers.BertForMaskedLM))
    loaded = load(save(model, tmp_path / "mlm"))
    assert type(loaded) is transformers.BertForMaskedLM
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)
    assert report(loaded).rows == report(model).rows
    # Without the head the names lose their prefix.
    base = transformers.AutoModel.from_pretrained(tmp_path / "mlm")
    assert isinstance(base.encoder.layer[0].output.dense, LowRankLinear)
    wanted = model.bert(ids()).last_hidden_state
    assert torch.equal(base(ids()).last_hidden_state, wanted)


def test_a_base_model_loads_into_a_class_with_a_head(tmp_path):
    model = shrunk(bert())
    folder = save(model, tmp_path / "base")
    head = transformers.BertForSequenceClassification.from_pretrained(folder, num_labels=3)
    found = head.bert(ids()).last_hidden_state
    assert torch.equal(found, model(ids()).last_hidden_state)


def test_dtype_and_device_map_and_saving_again(tmp_path):
    model = shrunk(bert())
    folder = save(model, tmp_path / "small")
    half = transformers.AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    layer = half.encoder.layer[1].intermediate.dense
    assert layer.first.dtype == layer.second.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.first, model.encoder.layer[1].intermediate.dense.first.bfloat16())
    pytest.importorskip("accelerate")
    for device_map in ("cpu", "auto"):
        mapped = transformers.AutoModel.from_pretrained(folder, device_map=device_map)
        out = mapped(ids()).last_hidden_state
        assert torch.equal(out.cpu(), model(ids()).last_hidden_state)
    mapped.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids()).last_hidden_state, model(ids()).last_hidden_state)
    again.double().train()  # nothing of what is forbidden on quantised weights
    assert again.encoder.layer[0].output.dense.first.requires_grad


def test_a_causal_model_with_conv1d_layers_generates(tmp_path):
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    batches = [{"input_ids": torch.randint(0, 50, (8, 16))} for _ in range(4)]
    dense = copy.deepcopy(model)
    config = LoRDConfig(ranks={"*.c_attn": 8, "*.c_fc": 8})
    lord_compress(model, batches, config, progress=False)
    assert isinstance(model.transformer.h[0].attn.c_attn, LowRankLinear)
    assert model.lm_head.weight is model.transformer.wte.weight
    loaded = load(save(model, tmp_path / "gpt"))
    prompt = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(prompt).logits, model(prompt).logits)
    assert loaded.generate(prompt, max_new_tokens=4, do_sample=False).shape == (1, 7)
    assert not torch.equal(dense(prompt).logits, model(prompt).logits)


def test_full_rank_output_pca_is_the_layer_and_conv1d_is_transposed():
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    torch.manual_seed(0)
    layer = transformers.GPT2LMHeadModel(config).transformer.h[0].mlp.c_fc
    wrapped = nn.Sequential(layer)
    x = torch.randn(400, 32)
    plan = RankPlan({"0": PlanEntry((128, 32), 25, "output_pca")})
    before = layer(x)
    factorize(wrapped, plan, [x], progress=False)
    assert wrapped[0].weight.shape == (32, 128)
    error = (wrapped[0](x) - before).square().sum() / (before - before.mean(0)).square().sum()
    assert float(error) == pytest.approx(wrapped[0].error, rel=1e-3)
    assert wrapped[0].error < 0.2


WITHOUT = """
import sys
from transformers import AutoModel
import torch
model = AutoModel.from_pretrained(sys.argv[1])
assert "fullrank" not in sys.modules
assert isinstance(model.encoder.layer[0].output.dense, torch.nn.Linear)
"""


def test_dense_export_needs_no_fullrank_and_says_its_size(tmp_path):
    model = shrunk(bert())
    said = export_dense(model, tmp_path / "dense")
    assert "size and speed of the dense one" in said
    assert isinstance(model.encoder.layer[0].output.dense, LowRankLinear)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    in_a_new_process(WITHOUT, tmp_path / "dense")
    dense = transformers.AutoModel.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(
        dense(ids()).last_hidden_state, model(ids()).last_hidden_state, rtol=1e-5, atol=1e-5
    )
    with pytest.raises(StoreError, match="exists already"):
        export_dense(model, tmp_path / "dense")


def test_biases_that_an_architecture_would_drop_are_not_exported(tmp_path):
    model = llama()
    with pytest.raises(StoreError, match=r"a bias that the architecture has not.* save the model"):
        export_dense(model, tmp_path / "dense")
    assert not (tmp_path / "dense").exists()
    to_dense(model)
    with pytest.raises(StoreError, match="a bias that the architecture has not"):
        export_dense(model, tmp_path / "dense")
    # With fullrank they are no matter.
    loaded = load(save(model, tmp_path / "wide"))
    assert isinstance(loaded.model.layers[0].mlp.up_proj, nn.Linear)
    assert torch.equal(loaded(ids()).logits, model(ids()).logits)


def test_added_biases_of_plain_modules_load(tmp_path):
    def net():
        torch.manual_seed(0)
        conv = nn.Conv2d(3, 16, 3, bias=False)
        return nn.Sequential(conv, nn.Flatten(), nn.Linear(64, 32, bias=False)).eval()

    x = torch.randn(50, 3, 4, 4) + 1
    plan = RankPlan(
        {"0": PlanEntry((16, 27), 4, "output_pca", scheme="channel"),
         "2": PlanEntry((32, 64), 4, "output_pca")}
    )  # fmt: skip
    model = to_dense(factorize(net(), plan, [x], progress=False))
    assert model[0].bias is not None
    for into in (net(), net().to("meta")):
        assert torch.equal(load(save_anew(model, tmp_path), into=into)(x), model(x))


def save_anew(model, tmp_path):
    return save(model, tmp_path / str(len(list(tmp_path.iterdir()))))


def test_what_changed_since_is_saved(tmp_path):
    model = shrunk(bert())
    first = model.encoder.layer[0]
    first.output.dense.truncate(3)
    first.intermediate.dense = first.intermediate.dense.to_dense()
    for copied in (model, copy.deepcopy(model)):
        copied.encoder.layer[1].output.dense.truncate(2 if copied is model else 4)
        copied.save_pretrained(folder := tmp_path / str(len(list(tmp_path.iterdir()))))
        loaded = transformers.AutoModel.from_pretrained(folder)
        assert report(loaded).rows == report(copied).rows
        assert torch.equal(loaded(ids()).last_hidden_state, copied(ids()).last_hidden_state)
    # A loaded model is followed as well, one that was pickled is as it was.
    loaded.encoder.layer[0].output.dense.truncate(1)
    loaded = pickle.loads(pickle.dumps(loaded))
    loaded.save_pretrained(tmp_path / "again")
    again = transformers.AutoModel.from_pretrained(tmp_path / "again")
    assert torch.equal(again(ids()).last_hidden_state, loaded(ids()).last_hidden_state)


def test_factors_that_are_not_in_the_file_are_missed(tmp_path):
    folder = save(shrunk(bert()), tmp_path / "small")
    tensors = load_file(folder / "model.safetensors")
    del tensors["encoder.layer.0.output.dense.second"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(StoreError, match=r"encoder\.layer\.0\.output\.dense as factorised, but"):
        transformers.AutoModel.from_pretrained(folder)


def test_dense_export_of_conv1d_layers_keeps_their_orientation(tmp_path):
    torch.manual_seed(0)
    # c_proj of the attention is square: its transpose would load as well.
    config = transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    factorize(model, make_plan(model, Fixed(6)), progress=False)
    assert isinstance(model.transformer.h[0].attn.c_proj, LowRankLinear)
    export_dense(model, tmp_path / "dense")
    dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert type(dense.transformer.h[0].attn.c_proj).__name__ == "Conv1D"
    torch.testing.assert_close(dense(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-5)


def test_newer_and_foreign_folders_are_named(tmp_path):
    folder = save(shrunk(bert()), tmp_path / "small")
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    quantization["format"] = 99
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match="newer fullrank"):
        transformers.AutoModel.from_pretrained(folder)
    quantization["format"] = 1
    quantization["layers"]["encoder.layer.0.output.dense"]["shape"] = [3, 4]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(StoreError, match="does not belong"):
        transformers.AutoModel.from_pretrained(folder)


def test_importing_in_either_order_registers():
    check = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as m; m['fullrank']"
    for first in (
        "import fullrank",
        "import transformers, fullrank",
        "import fullrank.compress.hub",
    ):
        in_a_new_process(f"{first}\n{check}")
    in_a_new_process("import fullrank, fullrank.compress, sys; assert 'torch' not in sys.modules")
