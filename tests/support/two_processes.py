"""A process group of a test's own, over gloo, for processes that end with it."""

import os
import sys
from contextlib import contextmanager


@contextmanager
def process_group(folder, rank, processes=2):
    """Meet the others in an empty folder; this process ends, well, where the block does."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=processes
    )
    yield
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads may outlive the group and abort an interpreter that takes itself apart.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
