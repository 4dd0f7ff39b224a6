"""How large each part of the comparison of adapters is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fullrank.core.errors import InputError

TASKS = ("digits", "retrieval", "language")
"""What is fine-tuned: an MLP, the embedded encoder, a causal language model."""


@dataclass(frozen=True)
class AdapterSize:
    """Budget of one task, the same for every way to fine-tune.

    Attributes
    ----------
    task, name
        One of :data:`TASKS`; ``"default"`` or ``"quick"``.
    rank, most_rank
        Of a method whose rank is 8 by default, others' in proportion; what layers allow.
    steps, batch, evaluations
        Of a run. The weights that are best on the dev part are kept.
    rates
        The grid of learning rates, ascending.
    seeds
        At the best of them.
    tokens
        Of a text or sequence.
    sample
        What a measurement looks at: documents of a collection, or bytes of a text.
    cycle
        Steps that are timed, a period of what refreshes.
    base
        Keys of the language model that is trained before, and of its loop.

    Examples
    --------
    >>> adapter_size("digits").rates
    (0.001, 0.003, 0.01, 0.03, 0.1)
    >>> adapter_size("digits", rates=3).rates
    (0.003, 0.01, 0.03)
    """

    task: str
    name: str
    rank: int
    most_rank: int
    steps: int
    batch: int
    evaluations: int
    rates: tuple[float, ...]
    seeds: int = 3
    tokens: int = 8
    sample: int = 1
    cycle: int = 20
    base: Mapping[str, Any] = field(default_factory=dict)


# The default sizes are for two cores of a CPU: two minutes, and an hour each other.
_SIZES = {
    size.task: size
    for size in (
        AdapterSize(
            "digits",
            "default",
            rank=4,
            most_rank=10,
            steps=150,
            batch=64,
            evaluations=5,
            rates=(1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
        ),
        AdapterSize(
            "retrieval",
            "default",
            rank=8,
            most_rank=384,
            steps=24,
            batch=16,
            evaluations=2,
            rates=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
            tokens=64,
            sample=300,
            cycle=4,
        ),
        AdapterSize(
            "language",
            "default",
            rank=8,
            most_rank=128,
            steps=200,
            batch=8,
            evaluations=5,
            rates=(3e-4, 1e-3, 3e-3, 1e-2),
            tokens=129,
            sample=32_768,
            base={
                "hidden_size": 128,
                "intermediate_size": 352,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "steps": 2000,
                "batch_size": 8,
            },
        ),
    )
}

_QUICK: Mapping[str, Mapping[str, Any]] = {
    "digits": {"steps": 60, "rates": (3e-3, 1e-2), "seeds": 2},
    "retrieval": {"steps": 6, "rates": (1e-4, 1e-3), "seeds": 1, "sample": 100},
    "language": {
        "steps": 60,
        "rates": (1e-3, 3e-3),
        "seeds": 1,
        "sample": 8192,
        "base": {**_SIZES["language"].base, "steps": 600},
    },
}


def adapter_size(
    task: str, *, quick: bool = False, rates: int | None = None, seeds: int | None = None
) -> AdapterSize:
    """Return the size of a task, with the middle ``rates`` of its grid, or other ``seeds``.

    Raises
    ------
    InputError
        For an unknown task, or more rates than the grid has.
    """
    if task not in _SIZES:
        raise InputError(f"task {task!r}; it is one of {', '.join(TASKS)}")
    size = _SIZES[task]
    if quick:
        size = replace(size, name="quick", **_QUICK[task])
    grid = size.rates
    if rates is not None and not 1 <= rates <= len(grid):
        raise InputError(f"rates={rates}; the grid of {task} has {len(grid)}")
    if seeds is not None and seeds < 1:
        raise InputError(f"seeds={seeds}; it is at least 1")
    first = (len(grid) - (rates or len(grid))) // 2
    return replace(
        size, rates=grid[first : first + (rates or len(grid))], seeds=seeds or size.seeds
    )
