"""Two processes under DDP equal one with the doubled batch, factors alike on both."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from two_processes import process_group

from fullrank.optim.mkor import MKOR
from fullrank.optim.mkor_hybrid import MKORH

STEPS = 7


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(27, 5), nn.Tanh())
    model.append(nn.Linear(5, 2, bias=False))
    return model.double()


def optimizer_of(model, kind):
    inner = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    options = {"patience": 1, "switch_beta": 3.0} if kind is MKORH else {}
    return kind(model, inner, inv_freq=2, clip=0.7, **options)


def train(model, optimizer, rows=slice(None)):
    for t in range(STEPS):
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(8, 1, 4, 4, dtype=torch.float64, generator=generator)[rows]
        optimizer.zero_grad()
        loss = (model(x) - x[:, 0, 0, :2]).square().mean()
        loss.backward()
        if isinstance(optimizer, MKORH):
            optimizer.step(loss=loss)
        else:
            optimizer.step()


def result(model, optimizer):
    layers = optimizer.state_dict()["mkor"]["layers"]
    switched = getattr(optimizer, "switched_at", None)
    return {"weights": model.state_dict(), "layers": layers, "switched": switched}


def work(rank, folder):
    torch.set_num_threads(1)
    with process_group(folder, rank):
        for kind in (MKOR, MKORH):
            model = build()
            wrapped = nn.parallel.DistributedDataParallel(model)
            optimizer = optimizer_of(wrapped, kind)
            train(wrapped, optimizer, slice(4 * rank, 4 * rank + 4))
            torch.save(result(model, optimizer), folder / f"{kind.__name__}-{rank}.pt")


@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_two_processes_equal_one(tmp_path):
    torch.multiprocessing.spawn(work, (tmp_path,), nprocs=2)
    for kind in (MKOR, MKORH):
        model = build()
        optimizer = optimizer_of(model, kind)
        train(model, optimizer)
        expected = result(model, optimizer)
        assert (expected["switched"] is not None) is (kind is MKORH)
        files = [tmp_path / f"{kind.__name__}-{rank}.pt" for rank in range(2)]
        ranks = [torch.load(file, weights_only=True) for file in files]
        torch.testing.assert_close(ranks[0], ranks[1], rtol=0, atol=0)
        torch.testing.assert_close(ranks[0], expected, rtol=1e-12, atol=1e-12)
