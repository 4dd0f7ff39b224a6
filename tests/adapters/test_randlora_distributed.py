"""RandLoRA with DDP and FSDP2 on two gloo processes: the adapter that one process trains."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)
pytest.importorskip("peft")

WORKER = Path(__file__).with_name("randlora_worker.py")
spec = importlib.util.spec_from_file_location("randlora_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(tmp_path), str(rank), "2"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate(timeout=120)[1] for process in running]
    assert all(p.returncode == 0 for p in running), "".join(e[-3000:] for e in errors)
    alone = worker.model()
    worker.train(alone)
    expected = worker.trained(alone)
    for kind in worker.KINDS:
        found = torch.load(tmp_path / f"{kind}.pt")
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-9)
