"""What GaLore refuses, and what it warns of."""

import io
import math

import numpy as np
import pytest
import torch
from stepping import parameter, random_grads, run
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import GaLoreAdafactor, GaLoreAdamW


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr=-1.0"),
        ({"lr": math.nan}, "lr=nan"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\]=1.0"),
        ({"betas": 0.9}, "betas=0.9"),
        ({"eps": -1e-8}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"rank": 0}, "rank=0"),
        ({"rank": -4}, "rank=-4"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"rank": True}, "rank=True"),
        ({"rank": [2, 3]}, "1 parameters lists 2 ranks"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"proj_type": "both"}, "proj_type='both'.*'std'"),
        ({"refresh": "random"}, "refresh='random'"),
        ({"moments": "forget"}, "moments='forget'"),
        ({"state_bits": 4}, "state_bits=4"),
        ({"nonfinite": "warn"}, "nonfinite='warn'"),
    ],
)
def test_bad_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        GaLoreAdamW([parameter(6, 8)], **options)
    assert isinstance(caught.value, InputError)
    if "nonfinite" not in options:
        optimizer = GaLoreAdamW([parameter(3, 3)])
        with pytest.raises(InputError, match=message):
            optimizer.add_param_group({"params": [parameter(6, 8)], **options})
        assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.1}, "relative_step"),
        ({"relative_step": False}, "learning rate"),
        ({"lr": 0.1, "relative_step": False, "warmup_init": True}, "warmup_init"),
        ({"beta1": 1.0}, "beta1"),
        ({"eps": 1e-30}, "eps"),
        ({"clip_threshold": 0.0}, "clip_threshold"),
    ],
)
def test_bad_adafactor_arguments_raise(options, message):
    with pytest.raises(InputError, match=message):
        GaLoreAdafactor([parameter(6, 8)], **options)
    with pytest.raises(InputError, match=message):
        GaLoreAdafactor([{"params": [parameter(6, 8)], **options}])


def test_numbers_of_numpy_are_taken_and_saved_as_pythons():
    options = {"lr": np.float64(0.01), "rank": [np.int64(2)], "generator": np.int64(3)}
    optimizer = GaLoreAdamW([parameter(6, 8)], **options)
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    assert torch.load(saved, weights_only=True)["param_groups"][0]["rank"] == [2]


def test_vectors_in_a_rank_group_warn_and_are_stepped():
    b = parameter(6)
    with pytest.warns(UserWarning, match=r"1 parameters .*shape \(6,\).*without projection"):
        optimizer = GaLoreAdamW([{"params": [b], "rank": 2}])
    before = b.detach().clone()
    run(optimizer, [b], random_grads([b], 1))
    assert not torch.equal(b, before)


def test_sparse_gradients_raise():
    embedding = nn.Embedding(10, 4, sparse=True)
    optimizer = GaLoreAdamW(embedding.parameters())
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="sparse gradient"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_only_real_floats_are_stepped(dtype):
    tensor = torch.zeros(4, 4, dtype=dtype)
    with pytest.raises(InputError, match=str(dtype)):
        GaLoreAdamW([tensor])


def test_a_parameter_in_two_groups_raises():
    W = parameter(4, 6)
    with pytest.raises(ValueError, match="more than one parameter group"):
        GaLoreAdamW([{"params": [W], "rank": 2}, {"params": [W]}])


def test_an_injected_basis_of_another_shape_raises():
    W = parameter(4, 6)
    optimizer = GaLoreAdamW([W], rank=2, projection_hook=lambda w, g, side: torch.ones(3, 3))
    with pytest.raises(InputError, match=r"\[\(3, 3\)\].*side 'left' needs \[\(4, 2\)\]"):
        run(optimizer, [W], random_grads([W], 1))
