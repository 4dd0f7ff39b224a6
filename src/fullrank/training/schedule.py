"""When training ends, and the learning rate on the way there."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from fullrank.training.config import Decay


class TimeBox:
    """How far a run has come, by steps or by the clock, whichever is further.

    Parameters
    ----------
    max_steps
        Steps after which it ends.
    seconds
        Seconds after which it ends, or None.
    warmup, decay
        See :class:`~fullrank.training.EncoderTraining`.
    clock
        Seconds from any start; for tests.

    Examples
    --------
    >>> box = TimeBox(max_steps=10, seconds=None, warmup=0.2, decay="linear")
    >>> [round(box.factor(step), 3) for step in (0, 1, 2, 6)]
    [0.5, 1.0, 1.0, 0.5]
    """

    def __init__(
        self,
        max_steps: int,
        seconds: float | None,
        *,
        warmup: float = 0.1,
        decay: Decay = "linear",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.max_steps = max_steps
        self.seconds = seconds
        self.warmup = warmup
        self.decay = decay
        self._clock = clock
        self._before = 0.0
        self._began: float | None = None

    def start(self, elapsed: float = 0.0) -> None:
        """Start the clock, with what an interrupted run has used already."""
        self._before, self._began = elapsed, self._clock()

    @property
    def elapsed(self) -> float:
        """Seconds used, over all parts of an interrupted run."""
        return self._before + (0.0 if self._began is None else self._clock() - self._began)

    def progress(self, step: int) -> float:
        """Share of the run that is over after so many steps, in [0, 1]."""
        share = step / self.max_steps
        if self.seconds is not None:
            share = max(share, self.elapsed / self.seconds)
        return min(share, 1.0)

    def factor(self, step: int) -> float:
        """Factor of the peak learning rate for the step after ``step`` steps."""
        begins = self.progress(step)
        # Rise to where this step will end, so that the first one is not wasted on a rate of 0.
        ends = max(begins * (step + 1) / max(step, 1), 1 / self.max_steps)
        if begins < self.warmup and ends < self.warmup:
            return ends / self.warmup
        left = min((1.0 - begins) / (1.0 - self.warmup), 1.0)
        if self.decay == "constant":
            return 1.0
        return left if self.decay == "linear" else 0.5 * (1.0 - math.cos(math.pi * left))
