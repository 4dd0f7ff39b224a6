"""Moments as they are kept: plain, or in 8 bits a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fullrank.optim.foundation import Spec, State
from fullrank.optim.inner.batch import Batch
from fullrank.optim.quantize import BLOCK, Blockwise


class Moments:
    """The moments of an inner update, by name.

    With 8 bits each is kept as codes with one float32 maximum per 256 elements (arXiv 2110.02861),
    arrays smaller than ``min_8bit_size`` as they are.

    Parameters
    ----------
    names
        Name -> whether the moment can be negative.
    bits
        32 (which keeps float64 for weights in float64) or 8.
    min_8bit_size
        4096, as bitsandbytes.

    Examples
    --------
    >>> Moments({"exp_avg": True}, bits=8).expected((64, 64), torch.float32)["exp_avg_absmax"]
    ((16,), torch.float32)
    """

    def __init__(
        self, names: Mapping[str, bool], bits: int = 32, min_8bit_size: int = 4096
    ) -> None:
        self.names = dict(names)
        self.bits = bits
        self.min_8bit_size = min_8bit_size

    def expected(self, shape: tuple[int, ...], dtype: torch.dtype) -> Spec:
        """Shape and dtype of every moment; in 8 bits each with its ``_absmax``."""
        numel = math.prod(shape)
        if self.bits != 8 or numel < self.min_8bit_size:
            return dict.fromkeys(self.names, (shape, dtype))
        spec: Spec = {}
        for name in self.names:
            spec[name] = (shape, torch.uint8)
            spec[f"{name}_absmax"] = ((-(-numel // BLOCK),), torch.float32)
        return spec

    def load(self, batch: Batch, name: str) -> list[Tensor]:
        """One moment of each matrix: the state's own tensor where it is plain."""
        dtype = batch.direction[0].dtype
        return [self.get(state, name).to(dtype) for state in batch.states]

    def save(self, batch: Batch, **values: list[Tensor]) -> None:
        """Write back what :meth:`load` gave and was then changed in place."""
        if self.bits == 32:
            return
        for name, each in values.items():
            for state, value in zip(batch.states, each, strict=True):
                self.put(state, name, value, batch.skip)

    def reset(self, state: State) -> None:
        """Zero all moments of one matrix."""
        for name in self.names:
            self.edit(state, name, Tensor.zero_)

    def edit(self, state: State, name: str, change: Callable[[Tensor], Any]) -> None:
        """Let ``change`` edit one moment of one matrix in place."""
        value = self.get(state, name)
        change(value)
        self.put(state, name, value)

    def get(self, state: State, name: str) -> Tensor:
        """One moment of one matrix: the state's own tensor where it is plain."""
        stored: Tensor = state[name]
        if stored.dtype != torch.uint8:
            return stored
        return Blockwise(self.names[name]).decode(stored, state[f"{name}_absmax"])

    def put(self, state: State, name: str, value: Tensor, skip: Tensor | None = None) -> None:
        """Write back what :meth:`get` gave; nothing where it is plain, or ``skip`` is True."""
        codes, absmax = state[name], state.get(f"{name}_absmax")
        if absmax is None:
            return
        code = Blockwise(self.names[name])
        if skip is None:
            code.encode(value.float(), codes, absmax)
            return
        # Encoding what was decoded is no identity: the lowest code means a little more than -1.
        new = torch.empty_like(codes), torch.empty_like(absmax)
        code.encode(value.float(), *new)
        codes.copy_(torch.where(skip, codes, new[0]))
        absmax.copy_(torch.where(skip, absmax, new[1]))
