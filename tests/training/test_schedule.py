"""The learning rate, and the end of a run by steps or by time."""

import pytest

from fullrank.training.schedule import TimeBox


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_rises_then_falls_by_steps():
    box = TimeBox(100, None, warmup=0.1)
    rates = [box.factor(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[99] == pytest.approx(1 / 90)
    assert box.factor(100) == 0.0


@pytest.mark.parametrize(("decay", "half"), [("linear", 0.5), ("cosine", 0.5), ("constant", 1.0)])
def test_shapes(decay, half):
    box = TimeBox(100, None, warmup=0.0, decay=decay)
    assert box.factor(0) == 1.0
    assert box.factor(50) == pytest.approx(half)


def test_the_clock_ends_a_run():
    clock = Clock()
    box = TimeBox(1000, 10.0, warmup=0.1, clock=clock)
    box.start()
    assert box.progress(1) == 0.001
    clock.now += 5
    assert box.progress(1) == 0.5
    assert box.factor(1) == pytest.approx(0.5 / 0.9)
    clock.now += 6
    assert box.progress(1) == 1.0
    assert box.factor(1) == 0.0


def test_time_of_the_part_before_counts():
    clock = Clock()
    box = TimeBox(1000, 10.0, clock=clock)
    assert box.elapsed == 0
    box.start(elapsed=4.0)
    clock.now += 1
    assert box.elapsed == 5.0
    assert box.progress(0) == 0.5


def test_the_first_step_is_not_wasted():
    box = TimeBox(100_000, 100.0, warmup=0.1, clock=Clock())
    box.start()
    assert box.factor(0) > 0
