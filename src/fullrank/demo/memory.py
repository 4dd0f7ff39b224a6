"""Memory of the process: what is free goes back to the system, so that peaks do not add up."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys


def give_back_memory() -> None:
    """Return what was freed to the system, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def peak_bytes() -> int:
    """Most memory this process ever held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)
