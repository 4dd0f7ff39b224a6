"""Tests of this folder need a GPU, and are skipped without one."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _gpu():
    if not torch.cuda.is_available():
        pytest.skip("no GPU on this machine")
    torch.manual_seed(0)
    # Products in TF32 would not be those of a CPU.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def no_host_sync():
    """A context in which whatever waits for the GPU raises."""
    from contextlib import contextmanager

    @contextmanager
    def strict():
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return strict
