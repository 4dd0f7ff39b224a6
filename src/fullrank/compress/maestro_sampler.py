"""Which layer runs at which rank in a step of Maestro."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from fullrank.core.errors import InputError


class PairSampler:
    """Draws ``(layer, rank)`` from all pairs, each once before any comes again.

    A layer of rank d has d pairs, so it is drawn in proportion to its rank. The order of a cycle
    follows from a seed and the cycle's number: the state is a few integers, and processes that
    start alike draw alike.

    Parameters
    ----------
    ranks
        Layer name -> its full rank; layers of rank 0 are not drawn.
    seed
        Of all orders.

    Examples
    --------
    >>> sampler = PairSampler({"a": 1, "b": 2}, seed=0)
    >>> sorted(sampler.draw() for _ in range(3))
    [('a', 1), ('b', 1), ('b', 2)]
    """

    def __init__(self, ranks: Mapping[str, int], seed: int) -> None:
        self._seed = seed
        self._cycle = self._position = 0
        self._set(ranks)

    def _set(self, ranks: Mapping[str, int]) -> None:
        self._ranks = dict(ranks)
        self._names = [name for name, rank in ranks.items() if rank > 0]
        self._ends = list(accumulate(ranks[name] for name in self._names))
        self._order: Tensor | None = None

    @property
    def pairs(self) -> int:
        """How many pairs there are: steps in a cycle."""
        return self._ends[-1] if self._ends else 0

    def draw(self) -> tuple[str, int]:
        """Return the next layer and its rank, from 1 to full.

        Raises
        ------
        InputError
            When no layer has any rank left.
        """
        if not self.pairs:
            raise InputError("every layer has shrunk to rank 0: a smaller lam, or a smaller eps")
        if self._position == self.pairs:
            self._cycle, self._position, self._order = self._cycle + 1, 0, None
        if self._order is None:
            self._order = self._shuffled()
        drawn = int(self._order[self._position])
        self._position += 1
        layer = bisect_right(self._ends, drawn)
        start = self._ends[layer - 1] if layer else 0
        return self._names[layer], drawn - start + 1

    def reset(self, ranks: Mapping[str, int]) -> None:
        """Start a new cycle over new ranks."""
        self._set(ranks)
        self._cycle, self._position = self._cycle + 1, 0

    def _shuffled(self) -> Tensor:
        # Two seeds must not give the same orders a cycle apart.
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + self._cycle) % 2**63)
        return torch.randperm(self.pairs, generator=generator)

    def state_dict(self) -> dict[str, Any]:
        """Where it stands, in integers."""
        return {
            "seed": self._seed,
            "cycle": self._cycle,
            "position": self._position,
            "ranks": dict(self._ranks),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave.

        Raises
        ------
        InputError
            When the state is of a model with other layers.
        """
        if set(state["ranks"]) != set(self._ranks):
            raise InputError("the state is of a model with other layers than this one's")
        self._seed, self._cycle = int(state["seed"]), int(state["cycle"])
        self._position = int(state["position"])
        self._set({name: int(state["ranks"][name]) for name in self._ranks})
