"""One process of two that train a RandLoRA adapter together, each on its half of the rows.

python randlora_worker.py FOLDER RANK PROCESSES
"""

import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from fullrank.adapters.randlora import RandLoraConfig

STEPS, ROWS = 3, 48
KINDS = ("ddp", "fsdp")


def model():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16)).double()
    config = RandLoraConfig(r=5, target_modules=["0", "2"], basis_dtype=torch.float64)
    return peft.get_peft_model(base, config)


def train(net, rank=0, processes=1):
    x = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = x[rank::processes]
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


def trained(net):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(net, options=options)
    return {name: value for name, value in state.items() if "randlora_" in name}


def wrapped(kind):
    net = model()
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    from torch.distributed.fsdp import fully_shard

    for name in ("0", "2"):
        fully_shard(net.base_model.model.get_submodule(name))
    return fully_shard(net)


def main():
    folder, rank, processes = Path(sys.argv[1]), *map(int, sys.argv[2:])
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=processes)
    for kind in KINDS:
        net = wrapped(kind)
        train(net, rank, processes)
        state = trained(net)
        if rank == 0:
            torch.save(state, folder / f"{kind}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
