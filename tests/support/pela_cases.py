"""A small network of blocks, and its student; stored numbers of the official code."""

from pathlib import Path

import numpy as np
import torch
from torch import nn

from fullrank.compress.pela import pela_compress

FOLDER = Path(__file__).parents[1] / "reference" / "pela"


def arrays(name):
    with np.load(FOLDER / f"{name}.npz") as stored:
        return {key: torch.tensor(stored[key]) for key in stored.files}


class Block(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return x + self.fc2(self.dropout(torch.tanh(self.fc1(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, width=16, hidden=24, classes=11, blocks=2):
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(blocks))
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def pair(dtype=torch.float64, ratio=2.0, seed=0):
    torch.manual_seed(seed)
    teacher = Net().to(dtype)
    return teacher, pela_compress(teacher, ratio)


def batch(seed=1, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 3, 16, generator=generator, dtype=dtype)
    return x, torch.randint(0, 11, (4,), generator=generator)
