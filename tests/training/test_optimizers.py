"""Param groups, and bytes of state counted against AdamW's."""

import pytest
import torch

from fullrank.training import EncoderTraining, StateMemory, build_optimizer
from fullrank.training.optimizers import measure_state, state_bytes


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(50, 32),
        torch.nn.Linear(32, 64),
        torch.nn.LayerNorm(64),
        torch.nn.Linear(64, 8),
    )


def step(network, optimizer):
    network(torch.arange(10)).square().sum().backward()
    optimizer.step()


def test_galore_projects_what_is_larger_than_the_rank():
    network = model()
    config = EncoderTraining(rank=16, lr=1e-3, scale=0.5, weight_decay=0.1)
    low, plain, matrices = build_optimizer(network, config).param_groups
    assert [p.shape for p in low["params"]] == [(64, 32)]
    assert low["lr"] == 2e-3
    # What is taken off a weight in a step is lr * weight_decay everywhere.
    assert low["lr"] * low["weight_decay"] == pytest.approx(1e-4)
    assert [p.ndim for p in plain["params"]] == [1, 1, 1, 1]
    assert plain["weight_decay"] == 0
    assert [tuple(p.shape) for p in matrices["params"]] == [(50, 32), (8, 64)]
    assert matrices["weight_decay"] == 0.1


def test_frozen_parameters_stay_out():
    network = model()
    network[0].weight.requires_grad_(False)
    optimizer = build_optimizer(network, EncoderTraining(optimizer="adamw"))
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(network[0].weight) not in held
    assert len(held) == 6


def test_memory_is_that_of_the_tensors():
    network = model()
    network[0].weight.requires_grad_(False)
    optimizer = build_optimizer(network, EncoderTraining(rank=16))
    step(network, optimizer)
    memory = measure_state(optimizer, network, "galore_adamw", 0)
    assert memory.projected == 64 * 32
    assert memory.frozen == 50 * 32
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert memory.trained == trained
    scalars = sum(
        v.numel() * v.element_size()
        for s in optimizer.state.values()
        for n, v in s.items()
        if v.ndim == 0
    )
    low_rank = 4 * (2 * 16 * 64 + 16 * 32)
    assert memory.peak_bytes - scalars == low_rank + 8 * (trained - memory.projected)
    assert memory.adamw_bytes == 8 * trained
    assert memory.adamw_bytes_unfrozen == 8 * (trained + 50 * 32)
    assert StateMemory.from_json(memory.to_json()) == memory
    assert "AdamW, nothing frozen" in str(memory.table())


def test_adamw_takes_what_is_said_of_it():
    network = model()
    optimizer = build_optimizer(network, EncoderTraining(optimizer="adamw"))
    step(network, optimizer)
    memory = measure_state(optimizer, network, "adamw", 0)
    assert memory.frozen == 0
    assert 0 <= state_bytes(optimizer) - memory.adamw_bytes <= 4 * len(list(network.parameters()))
    assert len(memory.table().rows) == 2
