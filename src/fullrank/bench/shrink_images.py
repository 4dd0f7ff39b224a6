"""A residual network on a part of CIFAR-10."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError, require


class Images(NamedTuple):
    """Train and test images ``(N, 3, 32, 32)`` with their labels ``(N,)``."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


def read_cifar10(train: int, test: int, data: str | Path | None = None) -> Images:
    """Read the first images of ``cifar10/{train,test}.parquet``, normalised by channel.

    Parameters
    ----------
    train, test
        How many images at most.
    data
        Folder that holds ``cifar10``; by default the one that ``FULLRANK_DATA`` names.

    Raises
    ------
    InputError
        When it is not there.
    """
    folder = Path(data or os.environ.get("FULLRANK_DATA") or ".") / "cifar10"
    if not (folder / "train.parquet").is_file():
        raise InputError(
            "CIFAR-10 is not part of the package: set the environment variable FULLRANK_DATA to "
            "the folder that holds cifar10/train.parquet and cifar10/test.parquet"
        )
    x, y = _read(folder / "train.parquet", train)
    x_test, y_test = _read(folder / "test.parquet", test)
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), keepdim=True)
    return Images((x - mean) / std, y, (x_test - mean) / std, y_test)


def _read(path: Path, count: int) -> tuple[Tensor, Tensor]:
    parquet = require("pyarrow.parquet", extra="hf")
    images = require("PIL.Image", extra="hf")
    rows = parquet.read_table(path).slice(0, count)
    opened = [images.open(io.BytesIO(cell["bytes"])) for cell in rows["img"].to_pylist()]
    x = torch.tensor(np.stack([np.asarray(image.convert("RGB")) for image in opened]))
    return x.permute(0, 3, 1, 2).float() / 255, torch.tensor(rows["label"].to_pylist())


class _Block(nn.Module):
    """Two convolutions and a way past them (He et al., 2016, figure 2)."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short: nn.Module = nn.Identity()
        if stride > 1 or channels != out:
            self.short = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return torch.relu(y + self.short(x))


def residual_net(channels: int, classes: int = 10) -> nn.Module:
    """Build a ResNet for 32 x 32 images: three stages of two blocks, channels doubling.

    >>> residual_net(4)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    c = channels
    return nn.Sequential(
        *(nn.Conv2d(3, c, 3, 1, 1, bias=False), nn.BatchNorm2d(c), nn.ReLU()),
        *(_Block(c, c, 1), _Block(c, c, 1)),
        *(_Block(c, 2 * c, 2), _Block(2 * c, 2 * c, 1)),
        *(_Block(2 * c, 4 * c, 2), _Block(4 * c, 4 * c, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * c, classes)),
    )
