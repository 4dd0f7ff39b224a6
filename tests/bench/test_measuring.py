"""Times that are comparable, and bytes that are alive."""

import pytest
import torch

from fullrank.bench.memory import Census
from fullrank.bench.timing import interleaved_times, stopwatch


class Machine:
    """A clock that only the steps of contestants move, slower in its second half."""

    def __init__(self):
        self.now = 0.0
        self.made = []

    def __call__(self):
        return self.now

    def contestant(self, name, cost, extra=0.0, period=10):
        count = 0

        def step(clock):
            nonlocal count
            busy = 3.0 if count >= 12 + period else 1.0
            began = clock()
            self.now += busy * (cost + (extra if count % period == 0 else 0.0))
            middle = clock()
            self.now += busy * 0.5
            count += 1
            self.made.append(name)
            return middle - began, clock() - middle

        return step


def test_a_period_counts_with_its_expensive_step_and_the_quieter_cycle():
    machine = Machine()
    steps = {"plain": machine.contestant("plain", 1.0), "svd": machine.contestant("svd", 1.0, 20.0)}
    found = interleaved_times(steps, machine, cycle=10, cycles=2, warmup=2, turn=5)
    assert found["plain"] == pytest.approx([1000.0, 500.0])
    assert found["svd"] == pytest.approx([3000.0, 500.0])  # 1 + 20 / 10
    assert machine.made.count("plain") == machine.made.count("svd") == 22
    assert machine.made[:10] == ["plain"] * 5 + ["svd"] * 5


def test_the_clock_of_a_cpu_leaves_out_waiting():
    import time

    clock = stopwatch(torch.device("cpu"))
    began = clock()
    time.sleep(0.2)
    assert clock() - began < 0.1


def test_the_most_bytes_alive_include_gradients_and_what_backward_needs():
    weight = torch.ones(100, 100, requires_grad=True)
    size = weight.numel() * 4
    with Census([weight]) as census:
        assert census.alive == size
        hidden = weight * 2
        loss = (hidden * hidden).sum()
        del hidden
        # Kept for the backward pass, though no name is left.
        assert census.alive >= 2 * size
        loss.backward()
        del loss
        assert weight.grad is not None
        assert census.alive == 2 * size
    assert 3 * size <= census.most <= 6 * size


def test_views_and_updates_in_place_cost_nothing():
    weight = torch.ones(1000)
    with Census([weight]) as census:
        weight.mul_(2)
        part = weight[:10].view(2, 5)
        assert part.sum() == 20
    assert census.alive <= 4000 + 8
