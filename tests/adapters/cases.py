"""The adapters that the matrix of tests goes through: a new one is a new row of ``CASES``.

``put`` makes and starts an adapter on a base model, ``config`` is PEFT's configuration for a
further adapter beside it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from small_net import TARGETS, samples

from fullrank.adapters.adapt import adapt
from fullrank.adapters.flylora import FlyLoraConfig
from fullrank.adapters.hydra import HydraConfig
from fullrank.adapters.lora_sb import LoraSBConfig
from fullrank.adapters.randlora import RandLoraConfig


def batches():
    """What adapters that start from data are given."""
    ids, labels = samples().values()
    return [{"ids": ids[i : i + 8], "labels": labels[i : i + 8]} for i in (0, 8, 16)]


def loss_of(model, batch):
    return model(**batch)["loss"]


def resumed(case, model, folder):
    """Load a trainable adapter onto a fresh base."""
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True)


def resumed_beside_its_start(case, model, folder):
    """LoRA-GA writes what fits a fresh base; training goes on from the same start."""
    model = case.put(model, 2)
    model.load_adapter(folder, "default", is_trainable=True)
    return model


@dataclass(frozen=True)
class Case:
    """A row.

    Attributes
    ----------
    method, options
        Of ``adapt``.
    config
        ``(rank, **PEFT's options) -> config``, of an adapter that starts without data.
    layers
        What it can be put on.
    resume
        Brings a saved training back on a fresh base.
    bitwise
        A file gives the very numbers that were saved, and the base is under it untouched.
    several
        Whether others stand beside it: not where its start was taken out of the weight.
    low_rank
        Whether its update is one, and may be saved as LoRA's.
    additive
        Whether the updates of several add up.
    one_graph
        Whether ``torch.compile`` takes the model whole.
    merges
        Whether a weight can do what it does: not where the update depends on the token.
    """

    method: str
    config: Callable[..., Any]
    options: dict[str, Any] = field(default_factory=dict)
    layers: tuple[str, ...] = ("linear", "conv1d")
    resume: Callable[..., Any] = resumed
    bitwise: bool = True
    several: bool = True
    low_rank: bool = True
    additive: bool = True
    one_graph: bool = True
    merges: bool = True

    def put(self, model, rank, targets=TARGETS):
        """Put the adapter on a base model, from data where it needs them."""
        torch.manual_seed(0)
        return adapt(
            model,
            self.method,
            rank=rank,
            targets=targets,
            data=batches(),
            loss_fn=loss_of,
            progress=False,
            **self.options,
        )


def lora(rank, target_modules=None, **options):
    return peft.LoraConfig(
        r=rank, lora_alpha=rank, target_modules=target_modules or TARGETS, **options
    )


def ours(config, **fixed):
    def made(rank, target_modules=None, **options):
        return config(r=rank, target_modules=target_modules or TARGETS, **fixed, **options)

    return made


def dora(rank, target_modules=None, **options):
    return lora(rank, target_modules, use_dora=True, **options)


def all_experts(rank, target_modules=None, **options):
    return FlyLoraConfig(r=rank, k=rank, target_modules=target_modules or TARGETS, **options)


def hydra(rank, target_modules=None, **options):
    return HydraConfig(
        r_parallel=rank - rank // 2,
        r_sequential=rank // 2,
        target_modules=target_modules or TARGETS,
        **options,
    )


EVERY = ("linear", "conv1d", "embedding")
GA = {"resume": resumed_beside_its_start, "bitwise": False, "several": False}

CASES = {
    "lora": Case("lora", lora, layers=EVERY),
    # PEFT's DoRA scales the whole weight, and looks at its class in a way that breaks graphs.
    "gradnormlorp": Case(
        "gradnormlorp", dora, layers=EVERY, low_rank=False, additive=False, one_graph=False
    ),
    "eva": Case("eva", lora),
    "lora_ga": Case("lora_ga", lora, **GA),
    "lora_ga, weights kept": Case("lora_ga", lora, {"mode": "subtract_init"}, **GA),
    "flylora": Case("flylora", ours(FlyLoraConfig, k=1), {"k": 1}, low_rank=False, merges=False),
    "flylora, all experts": Case("flylora", all_experts, {"k": 2}),
    "hydra": Case("hydra", hydra),
    "hydra, biases": Case("hydra", hydra, {"branch_bias": True}),
    "randlora": Case("randlora", ours(RandLoraConfig), low_rank=False),
    "lora_sb": Case("lora_sb", ours(LoraSBConfig, init="xs"), {"lr": 1e-2, "n_samples": 20}),
}


def trained(model):
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def shaken(model, seed=0):
    """Move what is trained off its start, so that the update is there to be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trained(model).values():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter) * 0.2)
    return model


def train(model, steps=3, optimizer=None, rows=slice(None)):
    """AdamW on what is trained; return the optimizer, for more."""
    batch = {name: tensor[rows] for name, tensor in samples().items()}
    optimizer = optimizer or torch.optim.AdamW(trained(model).values(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**batch)["loss"].backward()
        optimizer.step()
    return optimizer
