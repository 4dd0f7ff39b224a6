"""One process of the distributed tests: trains a small model and writes down what came of it.

python distributed_worker.py FOLDER RANK PROCESSES TASK [CASE ...]
"""

import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from fullrank.optim import (
    LIFT,
    MKOR,
    SGDP,
    AdamP,
    FiraAdamW,
    FrugalAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    GradNormLoRPAdamW,
    LoRAPro,
    allocate_as_saved,
    step_per_layer,
)

frugal = partial(FrugalAdamW, update_gap=3, density=0.3)
projected = {"update_proj_gap": 3}
# Of matrices and of the other parameters, in a group each.
GROUPED = {
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
    "lift": partial(LIFT, lra_rank=4, update_interval=3),
    # Of the weights before a normalisation the test finds the layer; with a large threshold the
    # channels of all.
    "adamp": partial(AdamP, weight_decay=0.1),
    "adamp_channels": partial(AdamP, delta=100.0, nesterov=True),
    "adamp_columns": partial(AdamP, delta=100.0, channel_dim=-1),
    "sgdp": partial(SGDP, momentum=0.9, weight_decay=0.01),
    "sgdp_channels": partial(SGDP, momentum=0.9, delta=100.0, project_buffer=True),
}
# Of a model with LoRA layers.
LORA = {
    "lora_pro": partial(LoRAPro, lr=0.01),
    "lora_pro_efficient": partial(LoRAPro, lr=0.01, mode="efficient"),
    "lora_pro_sgd": partial(LoRAPro, lr=0.01, optimizer="sgd"),
}
# They need their weights whole.
DDP_ONLY = [*LORA, "mkor"]


class LoraLinear(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.base = nn.Linear(inside, outside).requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(inside, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, outside, bias=False)})
        self.scaling = {"default": 2.0}

    def forward(self, x):
        return self.base(x) + 2.0 * self.lora_B["default"](self.lora_A["default"](x))


def model(dtype, case=""):
    torch.manual_seed(0)
    if case in LORA:
        layers = [LoraLinear(12, 21), nn.GELU(), nn.LayerNorm(21), LoraLinear(21, 9)]
    elif case.startswith(("adamp", "sgdp")):
        free = nn.Linear(12, 21, bias=False)
        layers = [free, nn.LayerNorm(21, eps=0.0), nn.GELU(), nn.Linear(21, 9)]
    else:
        layers = [nn.Linear(12, 21), nn.GELU(), nn.Linear(21, 9)]
    return nn.Sequential(*layers).to(dtype)


def optimizer(case, net):
    if case in LORA:
        return LORA[case](net)
    if case == "mkor":
        return MKOR(net, partial(torch.optim.AdamW, lr=0.01), inv_freq=2)
    weights = [p for p in net.parameters() if p.dim() == 2]
    others = [p for p in net.parameters() if p.dim() < 2]
    own = {"rank": 1 if case == "lift" else 3}
    if case.startswith("frugal"):
        own = {"is_proj_params": True}
    elif case.startswith(("adamp", "sgdp")):
        own = {}
    return GROUPED[case]([{"params": weights, **own}, {"params": others}], lr=0.01)


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
        if isinstance(opt, LIFT) and clip is not None:
            opt.clip_grad_norm_(clip)
        elif clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        opt.step()
        opt.zero_grad()


def weights(net):
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()]
    return [w.detach().clone() for w in whole]


def chosen(opt):
    """What was chosen from gradients, weights or seeds: the same on all processes."""
    found = {
        f"{i}.{name}": value
        for i, state in enumerate(opt.state.values())
        for name, value in state.items()
        if name.startswith("basis") or name in ("seed", "indices")
    }
    if isinstance(opt, AdamP | SGDP):
        branches = [opt.branch(p) for group in opt.param_groups for p in group["params"]]
        found["branches"] = torch.tensor([-1 if b is None else b for b in branches])
    return found


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
        net = wrapped(kind, model(dtype, name))
        opt = optimizer(name, net)
        clip = float(clip) if clip else None
        train(net, opt, range(7), dtype, rank, processes, int(accumulate), clip)
        found = {"weights": weights(net), "chosen": chosen(opt)}
        torch.save(found, folder / f"{case.replace(':', '-')}-{rank}.pt")


def ready(case):
    """A model and its optimizer, for saving and resuming on several processes."""
    net = wrapped("ddp" if case in DDP_ONLY else "fsdp", model(torch.float64, case))
    return net, optimizer(case, net)


def states(case, net, opt):
    params, state = get_state_dict(net, opt)
    if case == "mkor":  # of which torch leaves out the factors
        state = opt.state_dict()
    return {"model": params, "optimizer": state}


def task_save(folder, rank, processes, cases):
    for case in cases:
        net, opt = ready(case)
        train(net, opt, range(4), torch.float64, rank, processes)
        dcp.save(states(case, net, opt), checkpoint_id=folder / case)
        train(net, opt, range(4, 8), torch.float64, rank, processes)
        torch.save(weights(net), folder / f"{case}-saved-{rank}.pt")


def resume(folder, case, net, opt):
    if case == "mkor":
        allocate_as_saved(opt, folder / case)
    elif case == "frugal_block":  # in its second period
        allocate_as_saved(opt, folder / case, net)
    found = states(case, net, opt)
    dcp.load(found, checkpoint_id=folder / case)
    if case == "mkor":
        opt.load_state_dict(found["optimizer"])
        set_model_state_dict(net, found["model"])
    else:
        set_state_dict(
            net, opt, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
        )


def task_resume(folder, rank, processes, cases):
    for case in cases:
        net, opt = ready(case)
        resume(folder, case, net, opt)
        train(net, opt, range(4, 8), torch.float64, rank, processes)
        torch.save(weights(net), folder / f"{case}-resumed-{processes}-{rank}.pt")


def task_layers(folder, rank, processes, cases):
    for case in cases:
        net = shard(model(torch.float64, case))
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
    sys.path.append(str(Path(__file__).parents[1] / "support"))
    from two_processes import process_group

    meeting = folder / f"{task}-{processes}"
    meeting.mkdir(exist_ok=True)
    with process_group(meeting, rank, processes):
        globals()[f"task_{task}"](folder, rank, processes, cases)


if __name__ == "__main__":
    main()
