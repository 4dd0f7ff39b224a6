"""The loss against sentence-transformers' own, its mask, and chunking."""

import pytest
import torch

from fullrank.core import InputError
from fullrank.training import MaskedRankingLoss
from fullrank.training.ranking_loss import embed

COLUMNS = [
    ["bab bel", "cab", "dab del din dot"],
    ["bin bot bum bay bir bos", "cel cin", "dum"],
    ["fab fel", "gab gel gin got gum", "hab"],
]
LABELS = torch.tensor([[0, 0, 3], [1, 1, 4], [2, 2, 5]])


@pytest.fixture
def features(tiny):
    return [tiny.preprocess(texts) for texts in COLUMNS]


# How float32 rounds is the kernels' affair: plain ones are the same on every processor.
@torch.backends.mkldnn.flags(enabled=False)
def test_nothing_forbidden_is_sentence_transformers_loss(tiny, features):
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    tiny.eval()
    ours = MaskedRankingLoss(tiny, [()] * 3)
    theirs = MultipleNegativesRankingLoss(tiny)
    value = ours([dict(f) for f in features], LABELS)
    torch.testing.assert_close(value, theirs([dict(f) for f in features], None))
    value.backward()
    gradient = {n: p.grad.clone() for n, p in tiny.named_parameters() if p.grad is not None}
    tiny.zero_grad()
    theirs([dict(f) for f in features], None).backward()
    for name, parameter in tiny.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradient[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_forbidden_documents_leave_the_softmax():
    generator = torch.Generator().manual_seed(0)
    vectors = [
        torch.nn.functional.normalize(torch.randn(3, 8, generator=generator), dim=1)
        for _ in range(3)
    ]
    loss = MaskedRankingLoss(torch.nn.Identity(), [{0, 1, 5}, {1}, {2, 0}], scale=10.0)
    scores = 10 * vectors[0] @ torch.cat(vectors[1:]).T
    kept = [[0, 2, 3, 4], [0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]
    expected = sum(
        torch.logsumexp(scores[i, rows], 0) - scores[i, i] for i, rows in enumerate(kept)
    )
    torch.testing.assert_close(loss.from_vectors(vectors, LABELS), expected / 3)


def test_the_mask_keeps_every_pair_and_its_own_negatives():
    loss = MaskedRankingLoss(torch.nn.Identity(), [set(range(6))] * 3)
    expected = (~torch.eye(3, dtype=torch.bool)).repeat(1, 2)
    assert torch.equal(loss.mask(LABELS), expected)


@pytest.mark.parametrize("chunk", [1, 2, 4, None])
def test_vectors_do_not_depend_on_chunks(tiny, features, chunk):
    tiny.eval()
    apart = [tiny(dict(f))["sentence_embedding"] for f in features]
    together = embed(tiny, features, chunk)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_columns_that_differ_go_one_by_one(tiny, features):
    features[1].pop("token_type_ids")
    tiny.eval()
    assert [len(v) for v in embed(tiny, features, 2)] == [3, 3, 3]


def test_texts_padded_on_the_left(tiny, features):
    tiny.eval()
    expected = [tiny(dict(f))["sentence_embedding"] for f in features]
    for column in features:
        for name in ("input_ids", "token_type_ids", "attention_mask"):
            pad = torch.zeros(3, 1, dtype=column[name].dtype)
            column[name] = torch.cat([pad, column[name]], 1)
    # The positions move, so the vectors are others; they must still be one a text.
    assert [v.shape for v in embed(tiny, features, 2)] == [v.shape for v in expected]


def test_tokens_are_counted(tiny, features):
    loss = MaskedRankingLoss(tiny, [()] * 3)
    loss(features, LABELS)
    assert loss.tokens == sum(len(t.split()) + 2 for column in COLUMNS for t in column)


def test_labels_must_fit():
    loss = MaskedRankingLoss(torch.nn.Identity(), [()] * 3)
    with pytest.raises(InputError, match="labels of shape"):
        loss.from_vectors([torch.eye(3)] * 2, LABELS)
