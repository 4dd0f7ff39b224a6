"""What the matrix of tests does in other processes.

python matrix_worker.py load FOLDER            # every adapter, in a process that never made one
python matrix_worker.py train FOLDER RANK      # one of two that train every adapter together
"""

import sys
from pathlib import Path

import torch

KINDS = ("ddp", "fsdp")


def load(folder):
    """Load each adapter as a user would, and write what it computes."""
    import peft
    from small_net import net, samples

    from fullrank.adapters.lora_reading import read_config
    from fullrank.adapters.registration import make_known

    for path in sorted(folder.iterdir()):
        make_known(str(read_config(path / "adapter")["peft_type"]))
        model = peft.PeftModel.from_pretrained(net(), path / "adapter")
        torch.save(model(samples()["ids"]), path / "found.pt")


def wrapped(kind, model):
    from torch import nn
    from torch.distributed.fsdp import fully_shard

    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    for name in ("wide", "tall"):
        fully_shard(model.base_model.model.get_submodule(name))
    return fully_shard(model)


def whole(model, names):
    """The trained tensors, gathered."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    return {name: tensor for name, tensor in state.items() if name in names}


def train_together(folder, rank):
    import cases
    from small_net import net
    from two_processes import process_group

    with process_group(folder, rank):
        for number, case in enumerate(cases.CASES.values()):
            for kind in KINDS:
                model = case.put(net(dtype=torch.float64), 2)
                names = set(cases.trained(model))
                shared = wrapped(kind, model)
                cases.train(shared, rows=slice(rank, None, 2))
                state = whole(shared, names)
                if rank == 0:
                    torch.save(state, folder / f"{number}.{kind}.pt")


if __name__ == "__main__":
    job, folder, *rest = sys.argv[1:]
    here = Path(__file__).parent
    sys.path += [str(here), str(here.parent / "support")]
    if job == "load":
        load(Path(folder))
    else:
        train_together(Path(folder), *map(int, rest))
