"""The weight matrices of a model: which there are, and where in the model they stand."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError
from fullrank.core.names import canonical_modules, is_linear_like, stored_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

Kind = Literal["linear", "embedding", "head"]

_NUMBER = re.compile(r"^(?P<stack>.*?)\.?\b(?P<layer>\d+)\b\.?(?P<rest>.*)$")


@dataclass(frozen=True)
class Weight:
    """A weight matrix in a model.

    Attributes
    ----------
    name
        Canonical module name.
    kind
        ``"linear"``, ``"embedding"``, or ``"head"`` for a language model's output layer.
    shape
        ``(out, in)``; ``(vocabulary, width)`` for embeddings.
    rank
        Of a matrix that is stored as two factors; None for a dense one.
    fetch
        Gives the matrix, ``(out, in)``. Factors are multiplied out only then.
    dtype
        In which it is stored.
    """

    name: str
    kind: Kind
    shape: tuple[int, int]
    rank: int | None
    fetch: Callable[[], Tensor]
    dtype: torch.dtype = torch.float32

    @property
    def cost(self) -> float:
        """Operations that its spectrum takes, in proportion."""
        small, large = sorted(self.shape)
        return float(small) ** 2 * (large + 4 * small)


def weight_matrices(model: nn.Module) -> Iterator[Weight]:
    """Every matrix that multiplies activations or is looked up in, shared weights once.

    These are ``nn.Linear``, transformers' ``Conv1D``, ``nn.Embedding`` and layers of two factors.
    Weights that are not of a floating-point dtype (quantized ones) are passed over.

    Raises
    ------
    InputError
        On a weight without data (on the meta device).
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    seen: set[int] = set()
    for name, module in canonical_modules(model):
        weight = _weight(name, module, module is head)
        if weight is None:
            continue
        stored = module.first if weight.rank is not None else stored_weight(module)
        if id(stored) in seen:
            continue
        seen.add(id(stored))
        if stored.is_meta:
            raise InputError(f"{weight.name} is on the meta device: load the model's weights first")
        yield weight


def _weight(name: str, module: Any, is_head: bool) -> Weight | None:
    if hasattr(module, "merged_weight") and hasattr(module, "first"):
        first, second = module.first, module.second

        def product() -> Tensor:
            # Multiplied in float64, so that what is beyond the rank is rounding of that.
            return cast(Tensor, second.detach().double() @ first.detach().double())

        return Weight(
            name, "linear", (len(second), first.shape[1]), len(first), product, first.dtype
        )
    linear = is_linear_like(module)
    if not linear and not isinstance(module, nn.Embedding):
        return None
    matrix = module.weight
    if matrix.ndim != 2 or not matrix.is_floating_point() or not matrix.numel():
        return None
    kind: Kind = "head" if is_head else "linear" if linear else "embedding"
    matrix = matrix.detach()
    if type(module).__name__ == "Conv1D":  # which keeps (in, out)
        matrix = matrix.T
    m, n = matrix.shape
    return Weight(name, kind, (m, n), None, lambda: cast(Tensor, matrix), matrix.dtype)


def patterns(given: Iterable[str] | str | None) -> list[str] | None:
    """Shell patterns as a list; one string is one pattern, None says nothing.

    >>> patterns("*.query"), patterns(())
    (['*.query'], [])
    """
    if given is None:
        return None
    return [given] if isinstance(given, str) else list(given)


@dataclass(frozen=True)
class Place:
    """Where a matrix stands: layer ``layer`` of ``stack``, and which projection of it.

    >>> place("encoder.layer.3.attention.self.query")
    Place(stack='encoder.layer', layer=3, projection='attention.self.query')
    >>> place("embeddings.word_embeddings")
    Place(stack='', layer=None, projection='embeddings.word_embeddings')
    """

    stack: str
    layer: int | None
    projection: str


def place(name: str) -> Place:
    """Read a matrix's place off its name: the first number in it is the layer's."""
    found = _NUMBER.match(name)
    if found is None:
        return Place("", None, name)
    return Place(found["stack"], int(found["layer"]), found["rest"] or "weight")


def grid(names: Mapping[str, Any]) -> tuple[dict[str, dict[int, str]], list[str]]:
    """Arrange names as rows (projections) by columns (layers), and the rest.

    Returns
    -------
    tuple
        Row label -> {layer: name}, in order of appearance, and the names outside any layer. The
        label leaves out the stack when there is only one.
    """
    places = {name: place(name) for name in names}
    stacks = {p.stack for p in places.values() if p.layer is not None}
    rows: dict[str, dict[int, str]] = {}
    rest = []
    for name, p in places.items():
        if p.layer is None:
            rest.append(name)
        else:
            label = p.projection if len(stacks) == 1 else f"{p.stack} {p.projection}".strip()
            rows.setdefault(label, {})[p.layer] = name
    return rows, rest
