"""LIFT: half precision, state and its bytes, resume, skips and the schedule."""

import copy
import math

import pytest
import torch
from stepping import advance, assert_continues, random_grads
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import foundation, gradients, memory_table, state_bytes
from fullrank.optim.lift import LIFT


def half(master):
    W = nn.Parameter(torch.randn(20, 16).bfloat16())
    options = {"rank": 1, "lra_rank": 4, "update_interval": 3, "lr": 1e-4}
    return W, LIFT([W], master_weights=master, **options)


def test_small_updates_of_bf16_weights_add_up():
    moved = {}
    for master in (True, False):
        torch.manual_seed(0)
        W, optimizer = half(master)
        start = W.detach().clone()
        for _ in range(40):
            W.grad = torch.ones_like(W)
            optimizer.step()
        moved[master] = (W.detach() - start).float().abs().sum()
    # Steps of 1e-4 are below half a unit in the last place of most entries.
    assert moved[True] > 2 * moved[False]
    state = optimizer.state[W]
    assert state["exp_avg"].dtype == torch.float32
    assert "master" not in state


def test_bf16_with_master_follows_float32():
    W, optimizer = half(True)
    wide = nn.Parameter(W.detach().float())
    other = LIFT([wide], rank=1, lra_rank=4, update_interval=100, lr=1e-4)
    optimizer.param_groups[0]["update_interval"] = 100
    for (G,) in random_grads([W], 20):
        W.grad, wide.grad = G.bfloat16(), G.bfloat16().float()
        optimizer.step()
        other.step()
    ((_, mask),) = optimizer.masks()
    torch.testing.assert_close(optimizer.state[W]["master"], wide[mask].detach())
    assert torch.equal(W[mask], wide[mask].bfloat16())


def test_a_weight_set_from_outside_is_taken_as_it_is():
    W, optimizer = half(True)
    W.grad = torch.ones_like(W)
    optimizer.step()
    with torch.no_grad():
        W.fill_(2.0)
    W.grad = torch.zeros_like(W)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert (W == 2.0).all()


CASES = {
    "full": {},
    "randomized": {"svd": "randomized"},
    "decay": {"weight_decay": 0.1},
}


def build(case="full", dtype=torch.float32, **options):
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 12)).to(dtype)
    weights = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    group = {"params": weights, "rank": 1, "lra_rank": 3, "update_interval": 3}
    return model, LIFT([group, {"params": others}], lr=0.01, **{**CASES[case], **options})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_continuing_is_bit_equal_at_every_step(case, dtype):
    assert_continues(lambda: build(case, dtype), range(9))


def test_distributed_checkpoint_continues(tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    model, optimizer = build()
    advance(model, optimizer, range(4))
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "step")
    twin, other = build()
    weights, state = get_state_dict(twin, other)
    dcp.load({"model": weights, "optimizer": state}, checkpoint_id=tmp_path / "step")
    set_state_dict(twin, other, model_state_dict=weights, optim_state_dict=state)
    advance(model, optimizer, range(4, 9))
    advance(twin, other, range(4, 9))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "floats"), [(torch.float32, 2), (torch.bfloat16, 3)])
def test_state_bytes_follow_the_formula(dtype, floats):
    model, optimizer = build(dtype=dtype)
    masked = sum((floats * 4 + 4) * sum(p.shape) + 12 for p in model.parameters() if p.dim() == 2)
    plain = sum(8 * p.numel() + 8 for p in model.parameters() if p.dim() < 2)
    table = memory_table(optimizer)
    found = dict(zip(table.columns, table.rows[-1], strict=True))
    assert found["optimizer state"] == masked + plain
    advance(model, optimizer, range(1))
    assert state_bytes(optimizer) == masked + plain


def test_copies_work():
    model, optimizer = build()
    advance(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    advance(model, optimizer, range(2, 5))
    advance(twin, other, range(2, 5))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_of_others_are_refused():
    model, optimizer = build()
    advance(model, optimizer, range(2))
    foreign = torch.optim.AdamW([{"params": g["params"]} for g in optimizer.param_groups])
    foreign.step()
    before = copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(InputError, match="another optimizer"):
        optimizer.load_state_dict(foreign.state_dict())
    assert torch.equal(optimizer.state_dict()["state"][0]["indices"], before[0]["indices"])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["indices"] = saved["state"][0]["indices"][:-1]
    with pytest.raises(InputError, match="saved indices"):
        optimizer.load_state_dict(saved)
    saved["state"][0]["indices"] = saved["state"][0]["exp_avg"]
    with pytest.raises(InputError, match="indices"):
        optimizer.load_state_dict(saved)


# -- skips and the schedule ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_leaves_everything_as_it_was(dtype, on_device_or_not):
    model, optimizer = build("decay", dtype)
    advance(model, optimizer, range(4))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    advance(model, optimizer, [4])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name])
    for i, state in optimizer.state_dict()["state"].items():
        assert (state["step"], state["unseen"]) == (5, 1)
        for name in set(state) - {"step", "unseen"}:
            assert torch.equal(state[name], before[1][i][name]), name
    advance(model, optimizer, range(5, 9))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_a_choice_that_falls_on_a_skipped_step_is_made_at_the_next(on_device_or_not):
    W = nn.Parameter(torch.randn(20, 16))
    optimizer = LIFT([W], rank=1, lra_rank=4, update_interval=3, lr=0.1)
    chosen = []
    for t, (G,) in enumerate(random_grads([W], 8), 1):
        W.grad = G.float()
        if t == 3:
            W.grad[0, 0] = float("inf")
        optimizer.step()
        chosen.append(int(optimizer.state[W]["refreshed"]))
    assert chosen == [0, 0, 0, 4, 4, 6, 6, 6]


def test_the_device_path_takes_the_same_steps(monkeypatch):
    host, optimizer = build("decay", torch.float64)
    advance(host, optimizer, range(8))
    for module in (foundation, gradients):
        monkeypatch.setattr(module, "host_decides", lambda device: False)
    device, other = build("decay", torch.float64)
    advance(device, other, range(8))
    for a, b in zip(host.parameters(), device.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_a_nan_raises_on_request():
    model, optimizer = build(nonfinite="raise")
    advance(model, optimizer, range(4))
    with pytest.raises(InputError, match="NaN or infinity"):
        advance(model, optimizer, [4])


def test_zero_gradients_move_nothing_but_decay():
    model, optimizer = build()
    before = copy.deepcopy(model.state_dict())
    for _ in range(4):
        for param in model.parameters():
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_clipping_counts_trained_entries_only():
    W, b = nn.Parameter(torch.randn(20, 16)), nn.Parameter(torch.zeros(5))
    optimizer = LIFT([{"params": [W], "rank": 1, "lra_rank": 4}, {"params": [b]}])
    W.grad, b.grad = torch.full_like(W, 2.0), torch.full_like(b, 3.0)
    norm = optimizer.clip_grad_norm_(1.0)
    assert norm == pytest.approx(math.sqrt(36 * 4 + 5 * 9), rel=1e-6)
    ((_, mask),) = optimizer.masks()
    trained = torch.cat([W.grad[mask], b.grad])
    assert trained.norm() == pytest.approx(1.0, rel=1e-5)
    assert optimizer.clip_grad_norm_(10.0) == pytest.approx(1.0, rel=1e-5)
    assert trained.norm() == pytest.approx(1.0, rel=1e-5)
