"""Reranking with a (random) cross-encoder: the library's own scores, in any batching."""

import huggingface_hub
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_passages import prose
from tiny_models import cross_encoder, save_encoder

from fullrank.core import Corpus, InputError, Run
from fullrank.retrieval import BM25, CrossEncoderReranker, Reranker
from fullrank.retrieval import cross_encoder as cross_encoder_module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return cross_encoder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus():
    return Corpus([f"d{i}" for i in range(30)], [prose(3 + 3 * (i % 9), i) for i in range(30)])


@pytest.fixture(scope="module")
def queries():
    return {f"q{i}": prose(3, 300 + i) for i in range(5)}


@pytest.fixture(scope="module")
def reranker(folder):
    return CrossEncoderReranker(folder, device="cpu")


def test_scores_are_the_models_logits(reranker, corpus, queries):
    found = BM25(corpus)(queries)
    run = (BM25(corpus) >> reranker)(queries)
    for query, text in queries.items():
        ids = found[query].ids.tolist()
        pairs = [(text, corpus[i].contents) for i in ids]
        direct = reranker.model.predict(pairs, activation_fn=torch.nn.Identity())
        mine = run.to_dict()[query]
        np.testing.assert_allclose([mine[i] for i in ids], direct, atol=1e-5)
        assert (np.diff(run[query].scores) <= 0).all()


def test_batches_do_not_matter(folder, reranker, corpus, queries):
    found = BM25(corpus)(queries)
    small = CrossEncoderReranker(reranker.model, batch_size=2, corpus=corpus, progress=True)
    a, b = small(queries, found), reranker(queries, found, corpus)
    for query in queries:
        mine, other = a.to_dict()[query], b.to_dict()[query]
        assert mine.keys() == other.keys()
        for identifier, score in mine.items():
            assert score == pytest.approx(other[identifier], abs=1e-5)


def test_depth(reranker, corpus, queries):
    shallow = CrossEncoderReranker(reranker.model, depth=3, corpus=corpus)
    found = BM25(corpus)(queries)
    for query, ranking in shallow(queries, found).items():
        assert set(ranking.ids[:3]) == set(found[query].ids[:3])
        assert ranking.ids[3:].tolist() == found[query].ids[3:].tolist()


def test_texts_that_are_too_long_or_empty(reranker):
    corpus = Corpus(["a", "b"], ["rank " * 100_000, ""])
    run = Run({"q": (["a", "b"], [2.0, 1.0]), "p": (["a"], [1.0]), "none": ([], [])})
    out = reranker({"q": "value " * 20_000, "p": "", "none": "rank"}, run, corpus)
    assert [len(out[q]) for q in ("q", "p", "none")] == [2, 1, 0]
    assert reranker.score([("rank \ud800", "a")]) == reranker.score([("rank ?", "a")])
    assert isinstance(reranker, Reranker)


def test_max_tokens(folder, reranker, corpus):
    short = CrossEncoderReranker(folder, max_tokens=8, device="cpu")
    assert short.max_tokens == 8
    assert reranker.max_tokens == 64
    pair = [("one two three", "four five six seven eight nine ten")]
    assert short.score(pair) != reranker.score(pair)
    for wrong in (2, 65):
        with pytest.raises(InputError, match="max_tokens"):
            CrossEncoderReranker(folder, max_tokens=wrong, device="cpu")


def test_an_instance_is_not_changed(reranker, corpus, queries):
    before = reranker.model.activation_fn, reranker.model.max_seq_length
    CrossEncoderReranker(reranker.model, max_tokens=8, corpus=corpus)(
        queries, BM25(corpus)(queries)
    )
    assert (reranker.model.activation_fn, reranker.model.max_seq_length) == before


def test_documents_must_be_known(reranker, corpus):
    run = Run({"q": (["d1"], [1.0])})
    with pytest.raises(InputError, match="texts"):
        reranker({"q": "rank"}, run)
    with pytest.raises(InputError, match="nothing to rerank"):
        reranker({"q": "rank"}, None, corpus)
    with pytest.raises(InputError, match="'zz'"):
        reranker({"q": "rank"}, Run({"q": (["zz"], [1.0])}), corpus)


def test_a_model_without_a_score_is_refused(tmp_path, capfd, monkeypatch):
    with pytest.raises(InputError, match=r"no cross-encoder: .* classifier\.weight.*give a cross"):
        CrossEncoderReranker(save_encoder(tmp_path / "encoder"), device="cpu")
    assert "REPORT" not in "".join(capfd.readouterr())
    folder = cross_encoder(tmp_path / "lost")
    weights = load_file(folder / "model.safetensors")
    del weights["classifier.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"no weights for classifier\.bias"):
        CrossEncoderReranker(folder, device="cpu")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="give a cross-encoder") as error:
        CrossEncoderReranker("nobody/nothing")
    assert "minilm" not in str(error.value)


def test_a_model_that_the_library_saved(folder, reranker, tmp_path):
    reranker.model.save_pretrained(str(tmp_path / "saved"))
    pair = [("one two three", "four five")]
    again = CrossEncoderReranker(tmp_path / "saved", device="cpu")
    assert again.score(pair) == pytest.approx(reranker.score(pair), abs=1e-5)


def test_weights_are_read_once(folder, monkeypatch):
    original, devices = transformers.BertForSequenceClassification.from_pretrained, []

    def load(*given, **options):
        found = original(*given, **options)
        model = found[0] if isinstance(found, tuple) else found
        devices.append(model.device.type)
        return found

    monkeypatch.setattr(transformers.BertForSequenceClassification, "from_pretrained", load)
    CrossEncoderReranker(folder, device="cpu")
    assert sorted(devices) == ["cpu", "meta"]


def test_long_texts_share_one_tokenizer(reranker, monkeypatch):
    again = CrossEncoderReranker(reranker.model)
    copies = []
    original = cross_encoder_module.rust_tokenizer
    monkeypatch.setattr(
        cross_encoder_module, "rust_tokenizer", lambda t: copies.append(t) or original(t)
    )
    again.score([("rank", f"rank {i} " * 1000) for i in range(5)])
    assert len(copies) == 1


def test_bad_models(tmp_path):
    with pytest.raises(InputError, match="3 outputs"):
        CrossEncoderReranker(cross_encoder(tmp_path / "three", labels=3), device="cpu")
    with pytest.raises(InputError, match="no model"):
        CrossEncoderReranker(tmp_path / "nothing")
    with pytest.raises(InputError, match="a int"):
        CrossEncoderReranker(3)
    with pytest.raises(InputError, match="batch_size"):
        CrossEncoderReranker(cross_encoder(tmp_path / "one"), batch_size=0, device="cpu")
