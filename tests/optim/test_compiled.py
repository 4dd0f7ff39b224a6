"""Every optimizer with a compiled model: the trajectory and the state of the model itself."""

import copy

import pytest
import torch
from every_optimizer import EVERY, batch, loss_of, observe, same

pytestmark = pytest.mark.slow


@pytest.fixture(params=EVERY)
def case(request):
    torch._dynamo.reset()
    return EVERY[request.param]


def train(model, optimizer, steps):
    for t in steps:
        loss = loss_of(model, batch(t))
        loss.backward()
        optimizer.step()
        observe(optimizer, loss)
        optimizer.zero_grad()


def test_equals_the_model_as_it_is_and_states_are_exchanged(case):
    model, optimizer = case.build()
    train(model, optimizer, range(6))
    inside = case.model()
    compiled = torch.compile(inside, backend="aot_eager")
    other = case.make(compiled)  # parameters' names begin with _orig_mod here
    train(compiled, other, range(6))
    same(model, inside, 1e-6)
    # Either continues from the other's state.
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    model.load_state_dict(inside.state_dict())
    train(model, optimizer, range(6, 9))
    train(compiled, other, range(6, 9))
    same(model, inside, 1e-6)
