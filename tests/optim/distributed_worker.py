"""One process of the distributed tests: trains a small model and writes down what came of it.

python distributed_worker.py FOLDER RANK PROCESSES TASK [CASE ...]
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from fullrank.optim import (
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    step_per_layer,
)

frugal = partial(FrugalAdamW, update_gap=3, density=0.3)
projected = {"update_proj_gap": 3}
CASES = {
    "galore": partial(GaLoreAdamW, **projected),
    "galore_subspace": partial(GaLoreAdamW, refresh="subspace", **projected),
    "galore8": partial(GaLoreAdamW, state_bits=8, min_8bit_size=1, **projected),
    "adafactor": partial(GaLoreAdafactor, relative_step=False, beta1=0.9, **projected),
    "fira": partial(FiraAdamW, **projected),
    "gradnorm": partial(GradNormLoRPAdamW, **projected),
    "frugal_svd": partial(frugal, subspace="svd"),
    "frugal_random": partial(frugal, subspace="random"),
    "frugal_columns": partial(frugal, subspace="columns"),
    "frugal_rows": partial(frugal, subspace="rows"),
    "frugal_randk": partial(frugal, subspace="randk", stateful="lion"),
    "frugal_block": partial(frugal, subspace="block", density=0.5),
}


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 21), nn.GELU(), nn.Linear(21, 9)).to(dtype)


def optimizer(case, net):
    weights = [p for p in net.parameters() if p.dim() == 2]
    others = [p for p in net.parameters() if p.dim() < 2]
    own = {"is_proj_params": True} if case.startswith("frugal") else {"rank": 3}
    return CASES[case]([{"params": weights, **own}, {"params": others}], lr=0.01)


def batch(step, dtype):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    y = torch.randn(8, 9, generator=generator, dtype=torch.float64)
    return x.to(dtype), y.to(dtype)


def train(net, opt, steps, dtype, rank=0, processes=1, accumulate=1, clip=None):
    """Each process takes its rows; the mean over processes is that over all rows."""
    for step in steps:
        for part in range(accumulate):
            x, y = batch(step * accumulate + part, dtype)
            x, y = (t.chunk(processes)[rank] for t in (x, y))
            ((net(x) - y).square().mean() / accumulate).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        opt.step()
        opt.zero_grad()


def weights(net):
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return [w.detach().clone() for w in whole]


def bases(opt):
    return {
        f"{i}.{name}": value
        for i, state in enumerate(opt.state.values())
        for name, value in state.items()
        if name.startswith("basis") or name == "seed"
    }


def shard(net):
    from torch.distributed.fsdp import fully_shard

    for layer in net:
        if isinstance(layer, nn.Linear):
            fully_shard(layer)
    return fully_shard(net)


def wrapped(kind, net):
    return nn.parallel.DistributedDataParallel(net) if kind == "ddp" else shard(net)


def task_train(folder, rank, processes, cases):
    for case in cases:
        name, kind, bits, accumulate, clip = case.split(":")
        dtype = getattr(torch, bits)
        net = wrapped(kind, model(dtype))
        opt = optimizer(name, net)
        clip = float(clip) if clip else None
        train(net, opt, range(7), dtype, rank, processes, int(accumulate), clip)
        found = {"weights": weights(net), "bases": bases(opt)}
        torch.save(found, folder / f"{case.replace(':', '-')}-{rank}.pt")


def task_save(folder, rank, processes, cases):
    for case in cases:
        net = shard(model(torch.float64))
        opt = optimizer(case, net)
        train(net, opt, range(4), torch.float64, rank, processes)
        params, state = get_state_dict(net, opt)
        dcp.save({"model": params, "optimizer": state}, checkpoint_id=folder / case)
        train(net, opt, range(4, 8), torch.float64, rank, processes)
        torch.save(weights(net), folder / f"{case}-saved-{rank}.pt")


def resume(folder, case, net, opt):
    params, state = get_state_dict(net, opt)
    dcp.load({"model": params, "optimizer": state}, checkpoint_id=folder / case)
    set_state_dict(net, opt, model_state_dict=params, optim_state_dict=state)


def task_resume(folder, rank, processes, cases):
    for case in cases:
        net = shard(model(torch.float64))
        opt = optimizer(case, net)
        resume(folder, case, net, opt)
        train(net, opt, range(4, 8), torch.float64, rank, processes)
        torch.save(weights(net), folder / f"{case}-resumed-{processes}-{rank}.pt")


def task_layers(folder, rank, processes, cases):
    for case in cases:
        net = shard(model(torch.float64))
        opt = optimizer(case, net)
        with step_per_layer(opt):
            train(net, opt, range(5), torch.float64, rank, processes)
        torch.save(weights(net), folder / f"{case}-layers-{rank}.pt")
    plain = model(torch.float64)
    try:
        step_per_layer(optimizer("galore", plain))
    except ValueError as error:
        (folder / f"ddp-{rank}.txt").write_text(str(error))


def task_nan(folder, rank, processes, cases):
    """A gradient that is not finite in one process' part is skipped by all."""
    net = shard(model(torch.float64))
    opt = optimizer("galore", net)
    train(net, opt, range(2), torch.float64, rank, processes)
    before = weights(net)
    x, y = batch(5, torch.float64)
    (net(x) - y).square().mean().backward()
    if rank == 1:
        net[2].weight.grad.to_local()[0, 0] = float("nan")
    opt.step()
    same = all(torch.equal(a, b) for a, b in zip(before, weights(net), strict=True))
    (folder / f"nan-{rank}.txt").write_text(str(same))


def main():
    folder, rank, processes, task, *cases = sys.argv[1:]
    folder, rank, processes = Path(folder), int(rank), int(processes)
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting-{task}-{processes}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    globals()[f"task_{task}"](folder, rank, processes, cases)
    dist.barrier()
    dist.destroy_process_group()
    # Gloo's threads may outlive the group and abort an interpreter that takes itself apart.
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
