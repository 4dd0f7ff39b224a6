"""DDP and FSDP2 on two gloo processes: the trajectory of one process, resume on other numbers."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

WORKER = Path(__file__).with_name("distributed_worker.py")
spec = importlib.util.spec_from_file_location("distributed_worker", WORKER)
worker = importlib.util.module_from_spec(spec)
spec.loader.exec_module(worker)

pytestmark = pytest.mark.slow
BOTH = ("fsdp", "ddp")
FEW = ("galore", "fira", "lift", "adamp")
EVERY = [f"{name}:{kind}:float64:1:" for name in worker.GROUPED for kind in BOTH]
EVERY += [f"{name}:ddp:float64:1:" for name in worker.LORA]
MORE = [f"{name}:{kind}:float64:2:0.5" for name in FEW for kind in BOTH]
MORE += ["lora_pro:ddp:float64:2:0.5"]
SINGLE = [f"{name}:{kind}:float32:1:" for name in FEW for kind in BOTH]
SINGLE += ["lora_pro:ddp:float32:1:"]
RESUMED = [
    *("galore_subspace", "galore8", "adafactor", "fira", "gradnorm", "frugal_columns"),
    *("frugal_block", "lift", "adamp", "sgdp", "lora_pro", "mkor"),
]


def launch(folder, processes, task, *cases):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), str(rank), str(processes), task, *cases],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    errors = [process.communicate(timeout=280)[1] for process in running]
    for process, error in zip(running, errors, strict=True):
        assert process.returncode == 0, error[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    launch(folder, 2, "train", *EVERY, *MORE, *SINGLE)
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    launch(folder, 2, "save", *RESUMED)
    return folder


def alone(name, dtype, steps, accumulate=1, clip=None):
    net = worker.model(dtype, name)
    opt = worker.optimizer(name, net)
    worker.train(net, opt, steps, dtype, accumulate=accumulate, clip=clip)
    return worker.weights(net)


def close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("case", [*EVERY, *MORE, *SINGLE])
def test_trajectory_of_one_process(trained, case):
    name, _, bits, accumulate, clip = case.split(":")
    dtype = getattr(torch, bits)
    expected = alone(name, dtype, range(7), int(accumulate), float(clip) if clip else None)
    ranks = [torch.load(trained / f"{case.replace(':', '-')}-{r}.pt") for r in (0, 1)]
    # Eight bits round what may differ in the last of 64.
    tolerance = 1e-5 if bits == "float32" else 1e-12
    for found in ranks:
        close(found["weights"], expected, 1e-3 if name == "galore8" else tolerance)
    assert ranks[0]["chosen"].keys() == ranks[1]["chosen"].keys()
    for key, choice in ranks[0]["chosen"].items():
        assert torch.equal(choice, ranks[1]["chosen"][key])


@pytest.mark.parametrize("case", RESUMED)
def test_two_processes_continue_on_one(saved, case):
    net = worker.model(torch.float64, case)
    opt = worker.optimizer(case, net)
    worker.resume(saved, case, net, opt)
    worker.train(net, opt, range(4, 8), torch.float64)
    expected = torch.load(saved / f"{case}-saved-0.pt")
    close(worker.weights(net), expected, 1e-3 if case == "galore8" else 1e-12)


def test_two_processes_continue_on_four(saved):
    launch(saved, 4, "resume", *RESUMED)
    for case in RESUMED:
        expected = torch.load(saved / f"{case}-saved-0.pt")
        found = torch.load(saved / f"{case}-resumed-4-3.pt")
        close(found, expected, 1e-3 if case == "galore8" else 1e-12)


def test_layers_are_stepped_in_the_backward_pass_of_a_sharded_model(tmp_path):
    launch(tmp_path, 2, "layers", *FEW)
    for case in FEW:
        found = torch.load(tmp_path / f"{case}-layers-1.pt")
        close(found, alone(case, torch.float64, range(5)), 1e-12)
    assert "fully_shard" in (tmp_path / "ddp-0.txt").read_text()


def test_all_skip_what_one_finds_not_finite(tmp_path):
    launch(tmp_path, 2, "nan")
    assert [(tmp_path / f"nan-{rank}.txt").read_text() for rank in (0, 1)] == ["True", "True"]
