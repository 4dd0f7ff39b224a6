"""A small language model over bytes, trained first on one text and then on another.

Not a benchmark: what ``lora_pro.py`` and ``lift.py`` share.
"""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import torch
from torch import nn

CONTEXT = 64


def data_folder() -> Path | None:
    """The folder named by FULLRANK_DATA, None without one."""
    named = os.environ.get("FULLRANK_DATA")
    return Path(named) if named and Path(named).is_dir() else None


def tokens(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long()


def wikitext(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Train and test bytes of the pre-training text: WikiText-2's validation and test parts."""
    found = [
        next(p for p in sorted((folder / "wikitext-2").iterdir()) if part in p.name).read_text()
        for part in ("valid", "test")
    ]
    return tokens(found[0]), tokens(found[1])


def shakespeare(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    data = tokens((folder / "tinyshakespeare.txt").read_text())
    return data[:-100_000], data[-100_000:]


def gsm8k(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        lines = (folder / "gsm8k" / f"{name}.jsonl").read_text().splitlines()
        rows = (json.loads(line) for line in lines)
        return tokens("\n\n".join(f"{row['question']}\n{row['answer']}" for row in rows))

    return read("train"), read("test")


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.up_proj, self.down_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        h = self.norm_1(x)
        q, k, v = (
            layer(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o_proj(h.transpose(1, 2).flatten(2))
        return x + self.down_proj(nn.functional.gelu(self.up_proj(self.norm_2(x))))


class TinyLM(nn.Module):
    def __init__(self, width: int = 64, layers: int = 2, heads: int = 4):
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.place = nn.Embedding(CONTEXT, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, 256, bias=False)

    def forward(self, x):
        h = self.embed(x) + self.place.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.lm_head(self.norm(h))


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())


def batch(data: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(data) - CONTEXT - 1, (size, 1), generator=generator)
    return data[starts + torch.arange(CONTEXT + 1)]


def train(model, optimizer, data, steps: int, seed: int = 0, size: int = 16) -> None:
    """Train with a linear decay to zero over the last half of the steps."""
    generator = torch.Generator().manual_seed(seed)
    rates = [group["lr"] for group in optimizer.param_groups]
    for t in range(steps):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * min(1.0, 2.0 * (steps - t) / steps)
        optimizer.zero_grad()
        loss_of(model, batch(data, size, generator)).backward()
        optimizer.step()


@torch.no_grad()
def bits_per_byte(model, data, batches: int = 40) -> float:
    generator = torch.Generator().manual_seed(1234)
    losses = [loss_of(model, batch(data, 32, generator)).item() for _ in range(batches)]
    return sum(losses) / len(losses) / math.log(2)


def pretrained(folder: Path, width: int, layers: int, steps: int, seed: int = 0) -> TinyLM:
    torch.manual_seed(seed)
    model = TinyLM(width, layers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    train(model, optimizer, wikitext(folder)[0], steps, seed)
    return model


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
