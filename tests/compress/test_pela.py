"""PELA's loss: the official training, the terms' gradients, resume, bad input."""

import copy

import pytest
import torch
from pela_cases import Net, arrays, batch, pair
from torch import nn

from fullrank.compress.pela import pela_compress
from fullrank.compress.pela_loss import PELALoss, largest_error
from fullrank.core.errors import InputError

# -- official numbers ------------------------------------------------------------------------

PARTS = {"first": "0_weight", "second": "1_weight", "bias": "1_bias"}


def stored_name(name):
    """The name under which the reference has a parameter of the student."""
    module, _, leaf = name.rpartition(".")
    factored = module.endswith(("fc1", "fc2"))
    return f"{module}_{PARTS[leaf] if factored else leaf}".replace(".", "_")


def official():
    d = arrays("train_0")
    teacher = Net(classes=len(d["T_head_bias"])).double()
    for name, parameter in teacher.named_parameters():
        parameter.data = d["T_" + name.replace(".", "_")].clone()
    student = pela_compress(teacher, float(d["ratio"]))
    for name, parameter in student.named_parameters():
        parameter.data = d["S0_" + stored_name(name)].clone()
    loss = PELALoss(
        student,
        teacher,
        float(d["kd_alpha"]),
        float(d["inf_norm_weight"]),
        float(d["eps"]),
        criterion=nn.functional.cross_entropy,
        perturbation="two_sided",
    )
    return d, teacher, student, loss


def test_official_training():
    d, teacher, student, loss = official()
    before = {name: p.detach().clone() for name, p in teacher.named_parameters()}
    optimizer = torch.optim.SGD(student.parameters(), lr=float(d["lr"]))
    for step, (x, y) in enumerate(zip(d["X"], d["Y"], strict=True)):
        terms = loss.terms((x, y))
        parts = torch.stack([terms.task, terms.feature, terms.perturbation, terms.total])
        torch.testing.assert_close(
            parts.detach(), d["losses_ce_fm_inf_total"][step], rtol=1e-8, atol=1e-12
        )
        optimizer.zero_grad()
        terms.total.backward()
        if step == 0:
            for name, parameter in student.named_parameters():
                torch.testing.assert_close(
                    parameter.grad, d["g0_" + stored_name(name)], rtol=1e-8, atol=1e-12
                )
        optimizer.step()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(
            parameter.detach(), d["ST_" + stored_name(name)], rtol=1e-8, atol=1e-12
        )
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None


# -- the terms -------------------------------------------------------------------------------


def test_perturbation_gradient_is_that_of_one_entry():
    torch.manual_seed(3)
    A = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    B = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    W = torch.randn(5, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a, b: largest_error(a, b, W), (A, B))
    gap = (B @ A - W).abs()
    torch.testing.assert_close(largest_error(A, B, W), gap.max(), rtol=1e-14, atol=0)
    largest_error(A, B, W).backward()
    i, j = divmod(int(gap.argmax()), 7)
    assert B.grad.any(dim=1).nonzero().flatten().tolist() == [i]
    assert A.grad.any(dim=0).nonzero().flatten().tolist() == [j]


def test_whole_loss_against_finite_differences():
    teacher, student = pair()
    loss = PELALoss(student, teacher, criterion=nn.functional.cross_entropy, eps=0.0)
    named = dict(student.named_parameters())
    data = batch()

    def of(*values):
        saved = [p.data for p in named.values()]
        for parameter, value in zip(named.values(), values, strict=True):
            parameter.data = value
        try:
            return float(loss(data).detach())
        finally:
            for parameter, value in zip(named.values(), saved, strict=True):
                parameter.data = value

    loss(data).backward()
    generator = torch.Generator().manual_seed(0)
    points = [p.detach().clone() for p in named.values()]
    along = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in points]
    step = 1e-6
    up = of(*(p + step * a for p, a in zip(points, along, strict=True)))
    down = of(*(p - step * a for p, a in zip(points, along, strict=True)))
    slope = sum((p.grad * a).sum() for p, a in zip(named.values(), along, strict=True))
    assert float(slope) == pytest.approx((up - down) / (2 * step), rel=1e-6)


def test_hinge_is_free_below_eps_and_the_official_form_is_not():
    teacher, student = pair()
    for form, wanted in {"hinge": 0.0, "two_sided": 10.0}.items():
        loss = PELALoss(student, teacher, eps=10.0, hidden_states="last", perturbation=form)
        largest = torch.stack(
            [
                (layer.merged_weight() - original.weight).abs().max()
                for layer, original in loss._pairs
            ]
        )
        assert largest.max() < 10
        expected = (largest - wanted).square().mean() if wanted else torch.tensor(0.0)
        torch.testing.assert_close(loss.perturbation(), expected.double(), rtol=1e-12, atol=0)


def test_autocast_does_not_reach_the_perturbation():
    teacher, student = pair(torch.float32)
    loss = PELALoss(student, teacher, criterion=nn.functional.cross_entropy)
    plain = loss.perturbation()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss.terms(batch(dtype=torch.float32))
    assert torch.equal(terms.perturbation, plain)
    assert terms.feature.dtype == torch.float32
    half_teacher, half = pair(torch.bfloat16)
    assert PELALoss(half, half_teacher).perturbation().dtype == torch.float32


def test_every_trained_parameter_gets_a_gradient_and_the_teacher_none():
    teacher, student = pair()
    teacher.train()
    loss = PELALoss(student, teacher, criterion=nn.functional.cross_entropy)
    teacher.train()
    loss(batch()).backward()
    assert not teacher.training
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_terms_with_weight_zero_cost_nothing():
    teacher, student = pair()
    loss = PELALoss(student, teacher, alpha=0, criterion=nn.functional.cross_entropy)
    teacher.forward = None
    terms = loss.terms(batch())
    assert terms.feature == 0
    assert terms.perturbation > 0
    teacher, student = pair()
    loss = PELALoss(student, teacher, beta=0, criterion=nn.functional.cross_entropy)
    assert loss.terms(batch()).perturbation == 0
    # Without labels: features alone.
    loss = PELALoss(student, teacher, beta=0)
    terms = loss.terms(batch()[0])
    assert terms.task == 0
    assert torch.equal(terms.total, terms.feature)


def test_every_second_call_and_resume():
    teacher, student = pair()

    def made():
        return PELALoss(student, teacher, criterion=nn.functional.cross_entropy, every=2)

    loss = made()
    due = [bool(loss.terms(batch()).perturbation > 0) for _ in range(3)]
    assert due == [True, False, True]
    again = made()
    again.load_state_dict(loss.state_dict())
    assert [bool(again.terms(batch()).perturbation > 0) for _ in range(2)] == [False, True]


def test_padding_does_not_count():
    teacher, student = pair()

    class Masked(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, attention_mask):
            return self.inner(x)

    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]])
    x = batch()[0]
    y = torch.where(mask[..., None].bool(), x, 7 * x)
    for ignore in (True, False):
        loss = PELALoss(Masked(student), Masked(teacher), beta=0, ignore_padding=ignore)
        near = loss({"x": x, "attention_mask": mask})
        far = loss({"x": y, "attention_mask": mask})
        assert torch.allclose(near, far, rtol=1e-12) is ignore


def train(student, loss, optimizer, steps, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss(batch(step, torch.float32)).backward()
        optimizer.step()


def test_resuming_in_the_middle_is_bit_equal():
    def made():
        teacher, student = pair(torch.float32)
        loss = PELALoss(student, teacher, criterion=nn.functional.cross_entropy, every=3)
        return student, loss, torch.optim.AdamW(student.parameters(), lr=1e-2)

    student, loss, optimizer = made()
    train(student, loss, optimizer, 9)
    half, half_loss, half_optimizer = made()
    train(half, half_loss, half_optimizer, 4)
    states = [half.state_dict(), half_loss.state_dict(), half_optimizer.state_dict()]
    states = copy.deepcopy(states)
    again, again_loss, again_optimizer = made()
    for target, state in zip((again, again_loss, again_optimizer), states, strict=True):
        target.load_state_dict(state)
    train(again, again_loss, again_optimizer, 5, start=4)
    for one, two in zip(student.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


# -- bad input -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"beta": float("nan")}, "beta=nan"),
        ({"eps": -0.1}, "eps=-0.1"),
        ({"perturbation": "soft"}, "perturbation='soft'"),
        ({"every": 0}, "every=0"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    teacher, student = pair()
    with pytest.raises(InputError, match=message):
        PELALoss(student, teacher, **arguments)


def test_bad_pairs_are_named():
    teacher, student = pair()
    with pytest.raises(InputError, match="share parameters"):
        PELALoss(student, student)
    with pytest.raises(InputError, match="no factorised layer"):
        PELALoss(copy.deepcopy(teacher), teacher)
    with pytest.raises(InputError, match="teacher has no layer"):
        PELALoss(student, nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(InputError, match="teacher's weight is"):
        PELALoss(student, Net(hidden=20))
    other = PELALoss(student, Net(blocks=3).double(), criterion=nn.functional.cross_entropy)
    with pytest.raises(InputError, match="another model's teacher"):
        other(batch())
    loss = PELALoss(student, teacher, alpha=0, beta=0)
    with pytest.raises(InputError, match="nothing to train on"):
        loss(batch()[0])
