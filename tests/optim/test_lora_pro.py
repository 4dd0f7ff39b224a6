"""LoRAPro: forms and modes against the equations."""

import copy
import math

import pytest
import torch
from lora_cases import FORMS, build, pair, train
from torch import nn

from fullrank.optim.lora_adjust import CHOICES, adjust_lora_grads
from fullrank.optim.lora_pro import LoRAPro


@pytest.mark.parametrize("x", CHOICES)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)])
@pytest.mark.parametrize("form", ["full", "efficient", "sgd"])
def test_equals_the_equations(form, shape, x):
    m, n = shape
    r, s, lr, wd, eps = min(2, m, n), 1.5, 0.02, 0.1, 1e-8
    A, B = pair(m, n, r)
    a, b = A.detach().clone(), B.detach().clone()
    optimizer = LoRAPro([(A, B, s)], lr=lr, x=x, weight_decay=wd, **FORMS[form])
    state = {}

    def adam(key, g, t):
        mean, square = state.get(key, (torch.zeros_like(g), torch.zeros_like(g)))
        state[key] = (0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g)
        mean, square = state[key]
        return mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + eps)

    for t in range(1, 6):
        G = torch.randn(m, n, dtype=torch.float64)
        A.grad, B.grad = s * b.T @ G, s * G @ a.T
        optimizer.step()
        g_a, g_b = s * b.T @ G, s * G @ a.T
        decay = 1 - lr * wd
        if form == "full":
            dA, dB = adjust_lora_grads(a, b, g_a, g_b, s, "zero")
            N = adam("W", s * b @ dA + s * dB @ a, t)
            dA, dB = adjust_lora_grads(a, b, s * b.T @ N, s * N @ a.T, s, x)
            decay = math.sqrt(decay)
        else:
            dA, dB = adjust_lora_grads(a, b, g_a, g_b, s, x)
            if form == "efficient":
                dA, dB = adam("A", dA, t), adam("B", dB, t)
        a, b = decay * a - lr * dA, decay * b - lr * dB
    torch.testing.assert_close(A.detach(), a, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(B.detach(), b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", ["efficient", "sgd"])
def test_decaying_the_base_decays_the_whole_weight(form):
    A, B = pair()
    base = torch.randn(6, 9, dtype=torch.float64)
    whole = base + 2.0 * B.detach() @ A.detach()
    optimizer = LoRAPro(
        [(A, B, 2.0, base)], lr=0.1, weight_decay=0.5, decay_base=True, **FORMS[form]
    )
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    optimizer.step()
    torch.testing.assert_close(base + 2.0 * B.detach() @ A.detach(), 0.95 * whole)


def test_a_base_under_two_adapters_decays_once():
    base = torch.ones(6, 9, dtype=torch.float64)
    pairs = [(*pair(), 1.0, base), (*pair(), 2.0, base)]
    optimizer = LoRAPro(pairs, lr=0.1, weight_decay=0.5, decay_base=True)
    for A, B, *_ in pairs:
        A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    torch.testing.assert_close(base, torch.full_like(base, 0.95))


@pytest.mark.parametrize("form", ["full", "efficient", "sgd"])
def test_what_is_no_pair_gets_the_plain_optimizer(form):
    model, optimizer = build(form, weight_decay=0.1)
    twin = copy.deepcopy(model.norm)
    kind = torch.optim.SGD if form == "sgd" else torch.optim.AdamW
    plain = kind(twin.parameters(), lr=0.01, weight_decay=0.1 if form != "sgd" else 0.0)
    for t in range(3):
        for ours, theirs in zip(model.norm.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.full_like(ours, t + 1.0)
            theirs.grad = ours.grad.clone()
            if form == "sgd":
                theirs.data.mul_(1 - 0.01 * 0.1)
        optimizer.step()
        plain.step()
    for ours, theirs in zip(model.norm.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_small_step_lowers_the_loss():
    model, _ = build()
    optimizer = LoRAPro(model, lr=1e-3, optimizer="sgd")
    x = torch.randn(64, 20)
    train(model, LoRAPro(model, lr=0.01), range(2))
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        assert model(x).square().mean() < loss


def test_pairs_of_a_shape_together_equal_pairs_alone():
    model, optimizer = build("efficient", torch.float64)
    twin = copy.deepcopy(model)
    alone = [
        LoRAPro([(m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"])],
                lr=0.01, mode="efficient")
        for m in (twin.one, twin.two, twin.three)
    ]  # fmt: skip
    for t in range(3):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(t)).double()
        for net in (model, twin):
            net.zero_grad()
            net(x).square().mean().backward()
        model.norm.zero_grad()
        twin.norm.zero_grad()
        optimizer.step()
        for each in alone:
            each.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_convolutions_are_read_as_matrices():
    A = nn.Parameter(torch.randn(2, 3, 3, 3, dtype=torch.float64))
    B = nn.Parameter(torch.randn(5, 2, 1, 1, dtype=torch.float64))
    flat = [nn.Parameter(t.detach().flatten(1).clone()) for t in (A, B)]
    for mode in ("full", "efficient"):
        conv = LoRAPro([(A, B, 2.0)], lr=0.1, mode=mode)
        matrix = LoRAPro([(*flat, 2.0)], lr=0.1, mode=mode)
        for _ in range(3):
            for p, q in zip((A, B), flat, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.flatten(1).clone()
            conv.step()
            matrix.step()
    for p, q in zip((A, B), flat, strict=True):
        assert torch.equal(p.flatten(1), q)


@pytest.mark.parametrize("form", ["full", "efficient", "sgd"])
def test_layout_of_factors_and_gradients_does_not_matter(form):
    A, B = pair()
    turned = [nn.Parameter(t.detach().T.contiguous().T) for t in (A, B)]
    optimizers = [LoRAPro([(*each, 2.0)], lr=0.1, **FORMS[form]) for each in ((A, B), turned)]
    for _ in range(3):
        for p, q in zip((A, B), turned, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.T.contiguous().T
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip((A, B), turned, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_gradient_descent_is_between_lora_and_the_whole_weight():
    """Least squares to a target of decaying spectrum, each at the best of a few rates."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    U, V = torch.linalg.qr(draw(32, 32))[0], torch.linalg.qr(draw(48, 48))[0]
    gap = (U * 0.7 ** torch.arange(32.0)) @ V[:, :32].T
    Q = torch.linalg.qr(draw(48, 48))[0]
    covariance = (Q * torch.logspace(0, -1.5, 48).double()) @ Q.T
    start = draw(4, 48) / 48**0.5

    def loss(delta):
        return float(((delta - gap) @ covariance * (delta - gap)).sum() / 2)

    def run(method, lr):
        whole = nn.Parameter(torch.zeros_like(gap))
        A, B = nn.Parameter(start.clone()), nn.Parameter(start.new_zeros(32, 4))
        optimizer = {
            "whole": lambda: torch.optim.SGD([whole], lr=lr),
            "lora": lambda: torch.optim.SGD([A, B], lr=lr),
            "pro": lambda: LoRAPro([(A, B, 2.0)], lr=lr, optimizer="sgd"),
        }[method]()
        for _ in range(100):
            delta = (whole if method == "whole" else 2.0 * B @ A).detach()
            G = (delta - gap) @ covariance
            if G.norm() > 1e6:
                return float("inf")
            whole.grad, A.grad, B.grad = G, 2.0 * B.detach().T @ G, 2.0 * G @ A.detach().T
            optimizer.step()
        return loss((whole if method == "whole" else 2.0 * B @ A).detach())

    rates = [0.1, 0.5, 1.0, 1.7]
    found = {method: [run(method, lr) for lr in rates] for method in ("whole", "pro", "lora")}
    assert min(found["whole"]) < min(found["pro"]) < min(found["lora"])
    # Stable at the step size of the whole weight, where LoRA is not.
    assert found["pro"][-1] == min(found["pro"])
    assert found["lora"][-1] == float("inf")
