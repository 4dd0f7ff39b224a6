"""Room for checkpoints whose tensors are not those of a first step: blocks, MKOR's factors."""

from functools import partial

import pytest
import torch
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import LIFT, MKOR, MKORH, FrugalAdamW, allocate_as_saved

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict


def build(case):
    torch.manual_seed(0)
    # A layer wide enough for factors that are kept as columns.
    model = nn.Sequential(nn.Linear(70, 12), nn.Tanh(), nn.Linear(12, 70))
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    if case == "block":
        groups = [{"params": matrices, "is_proj_params": True}, {"params": vectors}]
        return model, FrugalAdamW(groups, lr=0.01, density=0.5, update_gap=2)
    if case == "lift":
        groups = [{"params": matrices, "rank": 1}, {"params": vectors}]
        return model, LIFT(groups, lr=0.01, lra_rank=2)
    kind = MKORH if case.startswith("mkorh") else MKOR
    inner = {"mkor sgd": torch.optim.SGD}.get(case, torch.optim.AdamW)
    return model, kind(model, partial(inner, lr=0.01), inv_freq=1)


def train(model, optimizer, steps):
    for t in steps:
        x = torch.randn(8, 70, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        (model(x) - x).square().mean().backward()
        optimizer.step()


def same(model, twin):
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("stop", [1, 3, 6])
@pytest.mark.parametrize("case", ["block", "mkor", "mkor sgd", "mkorh", "mkorh switched"])
def test_continues_from_the_optimizers_own_state(case, stop, tmp_path):
    model, optimizer = build(case)
    train(model, optimizer, range(stop))
    if case == "mkorh switched":
        optimizer.switch()
    saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(saved, checkpoint_id=tmp_path / "step")
    twin, other = build(case)
    allocate_as_saved(other, tmp_path / "step")
    found = {"model": twin.state_dict(), "optimizer": other.state_dict()}
    dcp.load(found, checkpoint_id=tmp_path / "step")
    twin.load_state_dict(found["model"])
    other.load_state_dict(found["optimizer"])
    train(model, optimizer, range(stop, 9))
    train(twin, other, range(stop, 9))
    same(model, twin)


@pytest.mark.parametrize("case", ["block", "lift"])
def test_continues_from_torchs_state_of_a_model(case, tmp_path):
    model, optimizer = build(case)
    train(model, optimizer, range(5))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"net": weights, "opt": state}, checkpoint_id=tmp_path / "step")
    twin, other = build(case)
    wrapped = torch.compile(twin, backend="eager")  # its names have a prefix, which does not count
    reader = dcp.FileSystemReader(tmp_path / "step")
    allocate_as_saved(other, reader, wrapped, key="opt")
    weights, state = get_state_dict(twin, other)
    dcp.load({"net": weights, "opt": state}, checkpoint_id=tmp_path / "step")
    set_state_dict(twin, other, model_state_dict=weights, optim_state_dict=state)
    train(model, optimizer, range(5, 9))
    train(twin, other, range(5, 9))
    same(model, twin)


def test_what_is_not_there_is_named(tmp_path):
    model, optimizer = build("block")
    with pytest.raises(InputError, match="no distributed checkpoint"):
        allocate_as_saved(optimizer, tmp_path)
    train(model, optimizer, range(3))
    dcp.save({"optimizer": optimizer.state_dict()}, checkpoint_id=tmp_path / "own")
    before = optimizer.state_dict()["state"]
    with pytest.raises(InputError, match="nothing under 'optim'"):
        allocate_as_saved(optimizer, tmp_path / "own", key="optim")
    with pytest.raises(InputError, match=r"state of '0' under 'optimizer'; .* has '0\.weight'"):
        allocate_as_saved(optimizer, tmp_path / "own", model)
    _, state = get_state_dict(model, optimizer)
    dcp.save({"optimizer": state}, checkpoint_id=tmp_path / "torch")
    with pytest.raises(InputError, match=r"state of '0\.bias'"):
        allocate_as_saved(optimizer, tmp_path / "torch")
    # A refusal changes nothing.
    for name, value in before[0].items():
        assert torch.equal(optimizer.state_dict()["state"][0][name], value)


def test_what_torch_leaves_out_of_mkor_is_said():
    model, optimizer = build("mkor")
    train(model, optimizer, range(2))
    weights, state = get_state_dict(model, optimizer)
    with pytest.raises(InputError, match=r"save optimizer\.state_dict"):
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
