"""Inner updates: what torch does, in 32 and in 8 bits, skipped where told."""

import pytest
import torch
from torch import nn

from fullrank.optim.inner import Adafactor, AdamW, Batch, Lion, Momentum, RMSprop

RULES = {
    "adamw": (AdamW, {}),
    "adamw_corrected": (lambda **kw: AdamW("corrected", **kw), {}),
    "adafactor": (lambda **kw: Adafactor(True, **kw), {}),
    "lion": (Lion, {}),
    "momentum": (Momentum, {}),
    "rmsprop": (RMSprop, {}),
    "rmsprop_all": (lambda **kw: RMSprop(True, True, **kw), {}),
}
GROUP = {
    "lr": 0.1,
    "betas": (0.9, 0.99),
    "beta": 0.9,
    "momentum": 0.8,
    "eps": 1e-3,
    "correct_bias": True,
}
ADAFACTOR = {
    "lr": 0.1,
    "eps": (1e-30, 1e-3),
    "clip_threshold": 1.0,
    "decay_rate": -0.8,
    "beta1": 0.9,
    "scale_parameter": False,
    "relative_step": False,
    "warmup_init": False,
}


def group_of(name):
    return ADAFACTOR if name == "adafactor" else GROUP


def allocate(rule, shape, dtype=torch.float32):
    spec = rule.expected(shape, dtype)
    return {name: torch.zeros(size, dtype=kind) for name, (size, kind) in spec.items()}


def run(rule, name, gradients, skip=None, shape=(6, 8), state=None):
    state = allocate(rule, shape) if state is None else state
    found = []
    for age, gradient in enumerate(gradients, 1):
        out = torch.empty(shape)
        batch = Batch(
            group=group_of(name),
            age=float(age),
            weights=[torch.ones(shape)],
            small=[gradient],
            direction=[out],
            states=[state],
            skip=skip,
        )
        size = rule.direction(batch)
        found.append(out * size)
    return found, state


@pytest.mark.parametrize("name", RULES)
def test_eight_bits_follow_thirty_two(name):
    make, _ = RULES[name]
    gradients = [torch.randn(6, 8) for _ in range(8)]
    exact, _ = run(make(), name, gradients)
    coded, state = run(make(bits=8, min_8bit_size=1), name, gradients)
    kinds = {value.dtype for value in state.values()}
    assert torch.uint8 in kinds
    for a, b in zip(exact, coded, strict=True):
        if name == "lion":  # a sign of what is near zero may turn
            assert (a == b).float().mean() > 0.9
        else:
            assert (a - b).norm() < 0.05 * a.norm()


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", RULES)
def test_a_skipped_step_leaves_no_trace(name, bits):
    rule = RULES[name][0](bits=bits, min_8bit_size=1)
    _, state = run(rule, name, [torch.randn(6, 8) for _ in range(3)])
    before = {key: value.clone() for key, value in state.items()}
    bad = torch.full((6, 8), float("nan"))
    (step,), _ = run(rule, name, [bad], skip=torch.tensor(True), state=state)
    assert not step.any()
    assert all(torch.equal(before[key], state[key]) for key in state)
    # With the flag down, nothing is different from having none.
    gradient = torch.randn(6, 8)
    twin = {key: value.clone() for key, value in state.items()}
    (a,), _ = run(rule, name, [gradient], skip=torch.tensor(False), state=state)
    (b,), _ = run(rule, name, [gradient], state=twin)
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", RULES)
def test_reset_forgets_all_and_a_change_reaches_the_first_moment(name, bits):
    rule = RULES[name][0](bits=bits, min_8bit_size=1)
    _, state = run(rule, name, [torch.randn(6, 8)])
    rule.on_first_moment(state, lambda m: m.mul_(0.0))
    first = [k for k in ("exp_avg", "momentum_buffer", "grad_avg") if k in state]
    for key in first:
        assert not (state[f"{key}_absmax"] if bits == 8 else state[key]).any()
    rule.reset(state)
    gradient = torch.randn(6, 8)
    (after,), _ = run(rule, name, [gradient], state=state)
    (fresh,), _ = run(rule, name, [gradient])
    torch.testing.assert_close(after, fresh)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
        ("rmsprop", lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9, eps=1e-3)),
        (
            "rmsprop_all",
            lambda p: torch.optim.RMSprop(
                p, lr=0.1, alpha=0.9, eps=1e-3, momentum=0.8, centered=True
            ),
        ),
        (
            "adamw_corrected",
            lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0),
        ),
    ],
)
def test_equals_torchs_optimizer(name, theirs):
    W = nn.Parameter(torch.zeros(6, 8))
    optimizer = theirs([W])
    gradients = [torch.randn(6, 8) for _ in range(5)]
    steps, _ = run(RULES[name][0](), name, gradients)
    expected = torch.zeros(6, 8)
    for gradient, step in zip(gradients, steps, strict=True):
        W.grad = gradient
        optimizer.step()
        expected -= step
        torch.testing.assert_close(W.detach(), expected, rtol=1e-4, atol=1e-6)


def test_small_arrays_stay_in_thirty_two_bits():
    spec = Lion(bits=8, min_8bit_size=4096).expected((64, 63), torch.float32)
    assert spec == {"exp_avg": ((64, 63), torch.float32)}
    spec = Lion(bits=8, min_8bit_size=4096).expected((64, 65), torch.float32)
    assert spec["exp_avg_absmax"] == ((17,), torch.float32)


def test_without_momentum_nothing_is_kept():
    rule = Momentum(keeps=False)
    assert rule.expected((6, 8), torch.float32) == {}
    gradient = torch.randn(6, 8)
    (step,), _ = run(rule, "momentum", [gradient])
    torch.testing.assert_close(step, 0.1 * gradient)
