"""Work for a benchmark's workers to do; in a module that other processes can import."""

import os
import time
from pathlib import Path

from fullrank.core import InputError


def work(job):
    """What the job's settings ask for."""
    settings = job.settings
    if job.kind == "refuse":
        raise InputError("this cannot be done")
    if job.kind == "break":
        raise ZeroDivisionError("a bug")
    if job.kind == "die":
        os._exit(3)
    if "pid" in settings:
        Path(settings["pid"]).write_text(str(os.getpid()))
    time.sleep(settings.get("seconds", 0))
    return {"loss": settings.get("loss"), "process": os.getpid(), "threads": threads()}


def threads():
    import torch

    return torch.get_num_threads()
