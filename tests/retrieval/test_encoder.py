"""The encoder against sentence-transformers itself."""

import copy

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Router
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from test_passages import prose
from tiny_models import sentence_model

from fullrank.compress import LowRankLinear
from fullrank.core import InputError
from fullrank.retrieval import Encoder, fast_encoder_int8
from fullrank.retrieval.fast_encoder import read_model
from fullrank.retrieval.fast_encoder_int8 import is_supported, quantize

TEXTS = [
    "", "a", "singular values", "Noise in transistor amplifiers at low frequencies.",
    "def f(x):\n    return x + 1", "naïve 日本語 🤖", "word " * 600,
    "The integral converges if and only if the exponent is greater than one. " * 3,
]  # fmt: skip

needs_int8 = pytest.mark.skipif(not is_supported(), reason="this CPU has no fast 8-bit products")


def library(model, texts):
    """Unit vectors as sentence-transformers makes them."""
    return model.encode(texts, normalize_embeddings=True, prompt="")


@pytest.fixture(scope="module")
def exact():
    return Encoder(dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return sentence_model(tmp_path_factory.mktemp("tiny"))


# -- the embedded model ----------------------------------------------------------------------


def test_float32_equals_sentence_transformers(exact):
    assert exact.path == "packed"
    assert exact.dtype == "float32"
    vectors = exact.encode(TEXTS)
    assert vectors.shape == (len(TEXTS), exact.dimension) == (len(TEXTS), 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, library(exact.model, TEXTS), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


@needs_int8
def test_int8_is_close(exact):
    encoder = Encoder(exact.model, dtype="int8")
    assert (encoder.path, encoder.dtype) == ("packed", "int8")
    cosines = (encoder.encode(TEXTS) * library(exact.model, TEXTS)).sum(1)
    assert cosines.mean() > 0.995
    assert cosines.min() > 0.98


@needs_int8
def test_auto_is_the_fastest_that_passes(exact):
    assert Encoder(exact.model).dtype == "int8"


def test_bfloat16_is_close(exact):
    encoder = Encoder(exact.model, dtype="bfloat16")
    cosines = (encoder.encode(TEXTS) * library(exact.model, TEXTS)).sum(1)
    assert encoder.dtype == "bfloat16"
    assert cosines.min() > 0.995


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=needs_int8)])
def test_order_and_company_do_not_matter(exact, dtype):
    encoder = Encoder(exact.model, dtype=dtype, batch_tokens=300)
    order = np.random.default_rng(0).permutation(len(TEXTS))
    together = encoder.encode(TEXTS)
    np.testing.assert_allclose(
        encoder.encode([TEXTS[i] for i in order]), together[order], atol=1e-6
    )
    alone = np.concatenate([encoder.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(alone, together, atol=1e-6)


def test_encoding_is_deterministic(exact):
    np.testing.assert_array_equal(exact.encode(TEXTS), exact.encode(TEXTS))


# -- small models ----------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_other_poolings(tmp_path, pooling):
    model = sentence_model(tmp_path, pooling=pooling)
    encoder = Encoder(model, dtype="float32")
    texts = [prose(n, n) for n in (1, 5, 9, 200)]
    assert encoder.path == "packed"
    np.testing.assert_allclose(encoder.encode(texts), library(model, texts), atol=1e-5)


def test_pooling_that_is_not_known_runs_in_the_library(tmp_path):
    model = sentence_model(tmp_path, pooling="max")
    encoder = Encoder(model, dtype="float32")
    texts = [prose(5, n) for n in range(40)]
    assert "max" in encoder.path
    np.testing.assert_allclose(encoder.encode(texts), library(model, texts), atol=1e-5)
    with pytest.raises(InputError, match="int8"):
        Encoder(model, dtype="int8").encode(texts)


def test_a_hook_is_respected(tiny):
    model = copy.deepcopy(tiny)
    layer = model[0].auto_model.encoder.layer[0].output.dense
    layer.register_forward_hook(lambda module, args, out: out * 0)
    encoder = Encoder(model, dtype="float32")
    assert "hooks" in encoder.path
    np.testing.assert_allclose(encoder.encode(["a cat"]), library(model, ["a cat"]), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("int8", marks=needs_int8)])
def test_factorised_models_run_packed(exact, dtype):
    model = copy.deepcopy(exact.model)
    for number, layer in enumerate(model[0].auto_model.encoder.layer):
        if number % 2:
            inside = layer.attention.self
            inside.query, inside.value = factorised(inside.query), factorised(inside.value)
        layer.intermediate.dense = factorised(layer.intermediate.dense)
        layer.output.dense = factorised(layer.output.dense)
    encoder = Encoder(model, dtype=dtype)
    assert (encoder.path, encoder.dtype) == ("packed", dtype)
    if dtype == "float32":
        np.testing.assert_allclose(encoder.encode(TEXTS), library(model, TEXTS), atol=2e-5)
    else:
        cosines = (encoder.encode(TEXTS) * library(model, TEXTS)).sum(1)
        assert cosines.mean() > 0.99


@needs_int8
def test_thick_factors_are_multiplied_out_on_cpus_with_amx(exact, monkeypatch):
    model = copy.deepcopy(exact.model)
    for layer in model[0].auto_model.encoder.layer:
        inside = layer.attention.self
        inside.query, inside.key = factorised(inside.query), factorised(inside.key)
        inside.value = factorised(inside.value)
        layer.output.dense = factorised(layer.output.dense, 96)
    monkeypatch.setattr(fast_encoder_int8, "has_amx", lambda: True)
    block = quantize(read_model(model), [[2, 3, 4], [5, 6, 7, 8]]).blocks[0]
    assert [len(chain.layers) for chain in block.projections] == [1]
    assert len(block.down.layers) == 2
    monkeypatch.setattr(fast_encoder_int8, "has_amx", lambda: False)
    block = quantize(read_model(model), [[2, 3, 4], [5, 6, 7, 8]]).blocks[0]
    assert [len(chain.layers) for chain in block.projections] == [2, 2, 2]


def factorised(linear, rank=160):
    layer = LowRankLinear(linear.in_features, linear.out_features, rank)
    u, s, vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    with torch.no_grad():
        layer.second.copy_(u[:, :rank] * s[:rank])
        layer.first.copy_(vh[:rank])
        layer.bias.copy_(linear.bias)
    return layer


def test_weights_that_change_are_read_again(tiny):
    model = copy.deepcopy(tiny)
    encoder = Encoder(model, dtype="float32")
    before, key, state = encoder.encode(["a cat"]), encoder.key, encoder.state
    fingerprint = encoder.fingerprint
    assert encoder.fingerprint == fingerprint == Encoder(model, dtype="float32").fingerprint
    model.truncate_dim = 4
    assert encoder.fingerprint != fingerprint
    model.truncate_dim = None
    assert encoder.fingerprint == fingerprint
    with torch.no_grad():
        model[0].auto_model.encoder.layer[0].output.dense.weight.mul_(1.5)
    after = encoder.encode(["a cat"])
    assert np.abs(after - before).max() > 1e-3
    assert encoder.key != key
    assert encoder.fingerprint != fingerprint
    assert encoder.state != state
    np.testing.assert_allclose(after, library(model, ["a cat"]), atol=1e-5)


def test_keys_tell_settings_apart(tiny, tmp_path):
    key = Encoder(tiny, dtype="float32").key
    assert Encoder(copy.deepcopy(tiny), dtype="float32").key == key
    others = [
        Encoder(tiny, dtype="float32", max_tokens=9),
        Encoder(tiny, dtype="float32", query_prompt="q: "),
        Encoder(tiny, dtype="bfloat16"),
        Encoder(sentence_model(tmp_path, seed=1), dtype="float32"),
    ]
    assert len({key, *(other.key for other in others)}) == 5


def test_prompts(tmp_path):
    model = sentence_model(tmp_path, prompts={"query": "query ", "document": "document "})
    encoder = Encoder(model, dtype="float32")
    assert (encoder.prompt("query"), encoder.prompt("document")) == ("query ", "document ")
    np.testing.assert_allclose(
        encoder.encode(["cat"], kind="query"), library(model, ["query cat"]), atol=1e-5
    )
    np.testing.assert_allclose(encoder.encode(["cat"]), library(model, ["document cat"]), atol=1e-5)
    np.testing.assert_allclose(
        encoder.encode(["cat"]),
        model.encode_document(["cat"], normalize_embeddings=True),
        atol=1e-5,
    )
    bare = Encoder(model, dtype="float32", query_prompt="", document_prompt="text ")
    np.testing.assert_allclose(
        bare.encode(["cat"], kind="query"), library(model, ["cat"]), atol=1e-5
    )
    np.testing.assert_allclose(bare.encode(["cat"]), library(model, ["text cat"]), atol=1e-5)


def test_prompts_of_all_names_count(tmp_path):
    model = sentence_model(tmp_path, prompts={"query": "query ", "passage": "document "})
    assert model.prompts["document"] == ""  # the library's own
    encoder = Encoder(model, dtype="float32")
    np.testing.assert_allclose(encoder.encode(["cat"]), library(model, ["document cat"]), atol=1e-5)


def test_a_prompt_may_be_left_out_of_the_pooling(tmp_path):
    model = sentence_model(tmp_path, prompts={"query": "one two "})
    model.set_pooling_include_prompt(False)
    expected = model.encode_query(["cat"], normalize_embeddings=True)
    found = Encoder(model, dtype="float32").encode(["cat"], kind="query")
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_queries_may_have_a_network_of_their_own(tmp_path):
    first, second = (sentence_model(tmp_path / f"{i}", seed=i) for i in range(2))
    router = Router.for_query_document(list(first), list(second))
    model = SentenceTransformer(modules=[router], device="cpu")
    encoder = Encoder(model, dtype="float32")
    np.testing.assert_allclose(
        encoder.encode(["cat"], kind="query"), library(first, ["cat"]), atol=1e-5
    )
    np.testing.assert_allclose(encoder.encode(["cat"]), library(second, ["cat"]), atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_shorter_vectors(tmp_path, pooling):
    model = sentence_model(tmp_path, pooling=pooling)
    key = Encoder(model).key
    model.truncate_dim = 16
    encoder = Encoder(model, dtype="float32")
    vectors = encoder.encode(["cat", "one two"])
    assert vectors.shape == (2, encoder.dimension) == (2, 16)
    np.testing.assert_allclose(vectors, library(model, ["cat", "one two"]), atol=1e-5)
    assert Encoder(model).key != key


def test_a_model_without_a_limit(tiny):
    words = StaticEmbedding(tiny.tokenizer.backend_tokenizer, embedding_dim=8)
    model = SentenceTransformer(modules=[words], device="cpu")
    texts = ["cat", prose(2000, 1)]
    found = Encoder(model, dtype="float32").encode(texts)
    np.testing.assert_allclose(found, library(model, texts), atol=1e-5)


def test_max_tokens(tiny):
    encoder = Encoder(tiny, dtype="float32", max_tokens=6)
    long = "one two three four five six seven"
    np.testing.assert_allclose(
        encoder.encode([long]), library(tiny, ["one two three four"]), atol=1e-5
    )
    assert tiny.max_seq_length == 64
    assert Encoder(tiny).max_tokens == 64
    for wrong in (2, 65):
        with pytest.raises(InputError, match="3 to 64"):
            Encoder(tiny, max_tokens=wrong)


def test_positions_that_begin_behind_padding_are_fewer(tiny):
    like_roberta = copy.deepcopy(tiny)
    like_roberta[0].auto_model.embeddings.position_embeddings.padding_idx = 1
    with pytest.raises(InputError, match="3 to 62"):
        Encoder(like_roberta, max_tokens=63)


def test_more_texts_than_a_window(tiny, monkeypatch):
    from fullrank.retrieval import encoder as module

    texts = [prose(1 + n % 7, n) for n in range(50)]
    encoder = Encoder(tiny, dtype="float32")
    whole = encoder.encode(texts)
    monkeypatch.setattr(module, "_WINDOW", 7)
    np.testing.assert_allclose(encoder.encode(texts, progress=True), whole, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_broken_unicode_is_read_as_far_as_it_goes(tmp_path, pooling):
    encoder = Encoder(sentence_model(tmp_path, pooling=pooling), dtype="float32")
    vectors = encoder.encode(["cat \ud800 one", "cat ? one"])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)


def test_no_texts(tiny):
    assert Encoder(tiny).encode([]).shape == (0, 64)


@pytest.mark.parametrize("texts", ["a single string", b"bytes", ["a", None], [3]])
def test_bad_texts(tiny, texts):
    with pytest.raises(InputError):
        Encoder(tiny).encode(texts)


def test_bad_settings(tiny, tmp_path):
    with pytest.raises(InputError, match="dtype"):
        Encoder(tiny, dtype="int4")
    with pytest.raises(InputError, match="batch_tokens"):
        Encoder(tiny, batch_tokens=0)
    with pytest.raises(InputError, match="kind"):
        Encoder(tiny).encode(["a"], kind="passage")
    with pytest.raises(InputError, match="no model"):
        Encoder(tmp_path / "nothing")
    with pytest.raises(InputError, match="no model"):
        Encoder(tmp_path)
    with pytest.raises(InputError, match="a int"):
        Encoder(3)
