"""How large a benchmark on language models is: model, data, steps, seeds."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fullrank.core.errors import InputError


@dataclass(frozen=True)
class Size:
    """A model over bytes and a training run of it.

    Attributes
    ----------
    width, layers, heads
        Of a Llama model; its MLP is 8/3 as wide, rounded up to a multiple of 32.
    context, batch
        Tokens that are predicted in a sequence, and sequences of a step.
    steps
        Optimizer steps of a run.
    evaluations, dev_bytes
        How often, and on how many bytes of the dev part, a run is measured.
    rates, seeds
        Learning rates of the grid, and seeds at the best of them.
    precision
        What forward and backward compute in.

    Examples
    --------
    >>> size = size_of("tiny")
    >>> size.tokens, size.rank
    (768000, 24)
    """

    name: str
    width: int
    layers: int
    heads: int
    context: int
    batch: int
    steps: int
    evaluations: int
    dev_bytes: int
    rates: int = 3
    seeds: int = 3
    precision: str = "float32"

    @property
    def rank(self) -> int:
        """Rank of what has one: a quarter of the width."""
        return max(1, self.width // 4)

    @property
    def tokens(self) -> int:
        """Tokens that a run is trained on."""
        return self.steps * self.batch * self.context

    def model(self) -> dict[str, Any]:
        """Return keys of the model's transformers configuration."""
        return {
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": -(-8 * self.width // 3 // 32) * 32,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "max_position_embeddings": self.context + 1,
        }


# tiny and small are for two cores of a CPU (90 minutes and 6 hours for all optimizers on two
# texts), base is for a GPU.
_SIZES = (
    Size("tiny", 96, 2, 4, context=64, batch=4, steps=3000, evaluations=12, dev_bytes=32_768),
    Size("small", 128, 4, 4, context=128, batch=4, steps=3000, evaluations=12, dev_bytes=65_536),
    Size(
        "base",
        512,
        8,
        8,
        context=256,
        batch=16,
        steps=5000,
        evaluations=20,
        dev_bytes=262_144,
        precision="bfloat16",
    ),
)


def size_of(name: str, *, rates: int | None = None, seeds: int | None = None) -> Size:
    """Return a size by name, with another number of rates or seeds where one is given.

    Raises
    ------
    InputError
        For an unknown name, or a number below 1.
    """
    found = next((size for size in _SIZES if size.name == name), None)
    if found is None:
        raise InputError(f"size {name!r}; it is one of {', '.join(s.name for s in _SIZES)}")
    for what, count in (("rates", rates), ("seeds", seeds)):
        if count is not None and count < 1:
            raise InputError(f"{what}={count}; it is at least 1")
    return replace(found, rates=rates or found.rates, seeds=seeds or found.seeds)
