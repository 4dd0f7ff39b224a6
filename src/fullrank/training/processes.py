"""One training in several processes, as torchrun and accelerate launch start them."""

from __future__ import annotations

import atexit
import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed

from fullrank.core.errors import InputError


class Processes:
    """Those that train one model together; just this one without a launcher.

    Attributes
    ----------
    count, rank
        How many there are, and which this is.

    Examples
    --------
    >>> alone = Processes()
    >>> alone.count, alone.main, alone.device("cpu")
    (1, True, device(type='cpu'))
    """

    def __init__(self) -> None:
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0")) if self.count > 1 else 0

    @property
    def main(self) -> bool:
        """Whether this one writes files and shows progress."""
        return self.rank == 0

    def device(self, wanted: str | None = None) -> torch.device:
        """Return where this process computes: its own GPU, where the GPU is asked for or found."""
        device = checked_device(wanted or ("cuda" if torch.cuda.is_available() else "cpu"))
        if device.type == "cuda" and self.count > 1:
            return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        return device

    def join(self, device: torch.device) -> None:
        """Meet the others; to be called before anything else is asked of them."""
        if self.count > 1:
            # Imported once there is a group, by the first model spread over it, this module keeps
            # the group, and with it its threads, to the very end.
            import torch._dynamo  # noqa: F401
            from accelerate import PartialState

            on_cpu = device.type == "cpu"
            PartialState(cpu=on_cpu, backend="gloo" if on_cpu else "nccl")
            # Threads of a group that is there when the interpreter ends may abort the process.
            atexit.unregister(_leave)
            atexit.register(_leave)

    def wait(self) -> None:
        """Return once all have come here."""
        if self.count > 1:
            distributed.barrier()

    def most(self, values: Tensor) -> Tensor:
        """Return the largest of each value over all processes; changes ``values``."""
        if self.count > 1:
            distributed.all_reduce(values, op=distributed.ReduceOp.MAX)
        return values

    def total(self, values: Tensor) -> Tensor:
        """Return the sum of each value over all processes; changes ``values``."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    @contextmanager
    def main_first(self) -> Iterator[bool]:
        """Let the main process do something while the others wait; yields whether to do it."""
        try:
            yield self.main
        finally:
            self.wait()


def checked_device(name: str) -> torch.device:
    """Return the device of a name, where this machine has it.

    Raises
    ------
    InputError
        When there is no device of that name.

    Examples
    --------
    >>> checked_device("gpu")
    Traceback (most recent call last):
        ...
    fullrank.core.errors.InputError: there is no device 'gpu' ...
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f"there is no device {name!r} on this machine; give cpu, cuda where there is a GPU, "
            "or none"
        ) from error
    return device


def _leave() -> None:
    # Models spread over the group hold it in cycles.
    gc.collect()
    if distributed.is_initialized():
        distributed.destroy_process_group()


class SharedClock:
    """A clock that shows all processes the same time, and whether one of them wants to stop.

    What they decide by the clock they then decide alike. Time stands still between the calls of
    :meth:`agree`; a process that is alone has the real time.

    Parameters
    ----------
    processes
        Those that share it.
    device
        Of what is sent between them.
    wanted
        Whether this one's user wants to stop.
    clock
        Seconds from any start.
    """

    def __init__(
        self,
        processes: Processes,
        device: torch.device,
        wanted: Callable[[], bool],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._processes, self._device = processes, device
        self._wanted, self._clock = wanted, clock
        # Machines count from different starts.
        self._start = clock()
        self._now, self.stop = 0.0, False

    def __call__(self) -> float:
        """Return the seconds."""
        return self._clock() - self._start if self._processes.count == 1 else self._now

    def agree(self) -> None:
        """Tell the others the time, and whether to stop."""
        self.stop = self._wanted()
        if self._processes.count > 1:
            mine = [self._clock() - self._start, float(self.stop)]
            now = torch.tensor(mine, dtype=torch.float64, device=self._device)
            self._now, stop = self._processes.most(now).tolist()
            self.stop = bool(stop)
