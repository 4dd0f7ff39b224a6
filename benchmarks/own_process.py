"""A piece of work in a process of its own, and the memory it takes there; Linux only."""

from __future__ import annotations

import multiprocessing
from pathlib import Path


def in_own_process(work, *arguments):
    """Call a function in a fresh process and return what it returns."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, work, *arguments))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _send(sender, work, *arguments) -> None:
    sender.send(work(*arguments))


def reset_peak() -> None:
    """Take this process' high-water mark of memory from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def memory_status(field: str) -> int:
    """Bytes of a field of this process' status, e.g. VmRSS (now) or VmHWM (most)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))
