"""Every optimizer follows torch's learning-rate schedulers, and continues within one."""

import copy

import pytest
from every_optimizer import EVERY, batch, loss_of, observe, same
from torch.optim import lr_scheduler

SCHEDULES = {
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "warm-up": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, 1.0, 3), lr_scheduler.ExponentialLR(o, 0.7)], [3]
    ),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0, threshold=0.3),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(
        o, 0.02, total_steps=12, cycle_momentum={"betas", "momentum"} & set(o.defaults) != set()
    ),
}
WATCHED = ("lr", "betas", "momentum")


@pytest.fixture(params=EVERY)
def case(request):
    return EVERY[request.param]


def step(model, optimizer, t):
    loss = loss_of(model, batch(t))
    loss.backward()
    optimizer.step()
    observe(optimizer, loss)
    optimizer.zero_grad()
    return loss.detach()


def advance(schedule, loss):
    if isinstance(schedule, lr_scheduler.ReduceLROnPlateau):
        schedule.step(loss)
    else:
        schedule.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_step_takes_the_rate_of_the_schedule(case, name):
    model, optimizer = case.build()
    schedule = SCHEDULES[name](optimizer)
    history = []
    for t in range(9):
        history.append([{k: g[k] for k in WATCHED if k in g} for g in optimizer.param_groups])
        advance(schedule, step(model, optimizer, t))
    assert len({groups[0]["lr"] for groups in history}) > 3
    twin, other = case.build()
    for t, groups in enumerate(history):
        for group, values in zip(other.param_groups, groups, strict=True):
            group.update(values)
        step(twin, other, t)
    same(model, twin)


def test_a_rate_of_zero_moves_nothing(case):
    model, optimizer = case.build()
    schedule = lr_scheduler.LambdaLR(optimizer, lambda t: 0.0 if t >= 4 else 1.0)
    for t in range(4):
        step(model, optimizer, t)
        schedule.step()
    before = copy.deepcopy(model)
    step(model, optimizer, 4)
    # Weights that are written as magnitude times direction may be rounded anew.
    same(model, before, 1e-6)


def test_continuing_within_a_schedule_is_bit_equal(case):
    model, optimizer = case.build()
    schedule = SCHEDULES["cosine"](optimizer)
    for t in range(9):
        if t == 4:
            saved = copy.deepcopy(
                (model.state_dict(), optimizer.state_dict(), schedule.state_dict())
            )
        advance(schedule, step(model, optimizer, t))
    twin, other = case.build()
    again = SCHEDULES["cosine"](other)
    for each, state in zip((twin, other, again), saved, strict=True):
        each.load_state_dict(state)
    for t in range(4, 9):
        advance(again, step(twin, other, t))
    same(model, twin)
