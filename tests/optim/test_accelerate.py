"""Every optimizer in accelerate: prepared, accumulated, clipped, saved and continued."""

import pytest
import torch
from every_optimizer import EVERY, batch, loss_of, observe, same

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(params=EVERY)
def case(request):
    return EVERY[request.param]


@pytest.fixture
def fresh():
    """An Accelerator that remembers nothing of those before it."""
    from accelerate.state import AcceleratorState, GradientState

    def make():
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        return accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)

    yield make
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def prepared(accelerator, case):
    model, optimizer = case.build()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.8**t)
    return accelerator.prepare(model, optimizer, schedule)


def train(accelerator, model, optimizer, schedule, passes):
    for t in passes:
        with accelerator.accumulate(model):
            loss = loss_of(model, batch(t))
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                observe(optimizer, loss)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


def by_hand(case, passes):
    model, optimizer = case.build()
    for t in passes:
        loss = loss_of(model, batch(t))
        (loss / 2).backward()
        if t % 2:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            observe(optimizer, loss)
            optimizer.step()
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * 0.8 ** ((t + 1) // 2)
    return model


def test_equals_the_loop_by_hand(case, fresh):
    accelerator = fresh()
    model, optimizer, schedule = prepared(accelerator, case)
    train(accelerator, model, optimizer, schedule, range(12))
    same(accelerator.unwrap_model(model), by_hand(case, range(12)), 1e-6)


def test_continues_bit_for_bit_from_a_saved_state(case, fresh, tmp_path):
    accelerator = fresh()
    model, optimizer, schedule = prepared(accelerator, case)
    train(accelerator, model, optimizer, schedule, range(8))
    accelerator.save_state(str(tmp_path))
    train(accelerator, model, optimizer, schedule, range(8, 14))
    other = fresh()
    twin, *rest = prepared(other, case)
    other.load_state(str(tmp_path))
    train(other, twin, *rest, range(8, 14))
    same(accelerator.unwrap_model(model), other.unwrap_model(twin))
