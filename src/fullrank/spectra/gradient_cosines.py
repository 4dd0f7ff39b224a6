"""How alike the gradients of neighbouring projections are: cosines, without the gradients.

Of ``G = D^T X``, with inputs ``X (T, n)`` and output gradients ``D (T, m)`` of a layer,
``<G_1, G_2> = sum_st (D_1 D_2^T)_st (X_1 X_2^T)_st``: two T x T matrices tell it. The paper
(arXiv 2504.10766) finds such cosines near 0 everywhere, whatever the quality of the data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fullrank.core.errors import InputError
from fullrank.spectra.fused_projections import parts_of
from fullrank.spectra.gradient_hooks import Modules, chosen_layers
from fullrank.spectra.gradient_spectrum import backward
from fullrank.spectra.matrices import grid, place

if TYPE_CHECKING:
    from torch import nn

PAIRS = {"q": "o", "k": "v"}
"""Projections of one layer that are compared with each other."""

# What models call the projections of attention; `x[q]` is a part of a fused layer.
_ROLES = {
    role: re.compile(rf"(\[{role}\]|(^|[._])({names}))$")
    for role, names in {
        "q": "q_proj|q_lin|query|wq|q",
        "k": "k_proj|k_lin|key|wk|k",
        "v": "v_proj|v_lin|value|wv|v",
        "o": "o_proj|out_proj|out_lin|c_proj|dense|wo|o",
    }.items()
}


@dataclass(frozen=True)
class GradientCosines:
    """Cosines of flattened gradients of one example.

    Attributes
    ----------
    adjacent
        Projection (the same place in every layer) -> layer -> cosine with that of the next layer.
    same_layer
        ``"q, o"`` and ``"k, v"`` -> layer -> cosine of the two projections, where they have
        equally many numbers. Of unequal shapes the numbers are paired as they are stored, row
        after row, as in the official code.
    """

    adjacent: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    same_layer: Mapping[str, Mapping[int, float]] = field(default_factory=dict)


def gradient_cosines(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    modules: Modules = "attention",
    *,
    attention_mask: Tensor | None = None,
) -> list[GradientCosines]:
    """Cosines of the gradients of adjacent layers and within layers, for every example.

    Two neighbouring layers' inputs and output gradients are held at a time, and no gradient but
    where query and output projections differ in shape.

    Parameters
    ----------
    model, input_ids, labels, modules, attention_mask
        As for :func:`~fullrank.spectra.gradient_spectrum`; each example's loss is the mean over
        its own tokens.

    Returns
    -------
    list
        One for each example. A gradient of zero has the cosine 0 with any other.

    Raises
    ------
    InputError
        As for :func:`~fullrank.spectra.gradient_spectrum`.

    Examples
    --------
    >>> (found,) = gradient_cosines(model, ids, labels)  # doctest: +SKIP
    >>> found.adjacent["self_attn.q_proj"][0], found.same_layer["k, v"][0]  # doctest: +SKIP
    """
    layers = chosen_layers(model, modules)
    sink = _Neighbours(layers, getattr(model, "config", None))
    losses, _ = backward(
        model, input_ids, labels, attention_mask, layers, sink.take, together=False
    )
    return [sink.cosines(example) for example in range(len(losses))]


def mean_cosines(found: Iterable[GradientCosines]) -> GradientCosines:
    """Mean over examples, layer by layer.

    >>> one, two = (GradientCosines({"q": {0: value}}) for value in (0.5, 0.0))
    >>> mean_cosines([one, two]).adjacent
    {'q': {0: 0.25}}
    """
    examples = list(found)
    if not examples:
        raise InputError("a mean over no examples")

    def mean(kind: str) -> dict[str, dict[int, float]]:
        first: Mapping[str, Mapping[int, float]] = getattr(examples[0], kind)
        return {
            name: {
                layer: sum(getattr(e, kind)[name][layer] for e in examples) / len(examples)
                for layer in layers
            }
            for name, layers in first.items()
        }

    return GradientCosines(mean("adjacent"), mean("same_layer"))


class _Gradient(NamedTuple):
    """Gradients ``D^T X`` of one projection, an example each: ``(B, T, out)``, ``(B, T, in)``."""

    D: Tensor
    X: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.D.shape[2], self.X.shape[2]

    @property
    def numel(self) -> int:
        return self.D.shape[2] * self.X.shape[2]

    def inner(self, other: _Gradient) -> Tensor:
        """Inner products ``(B,)`` of gradients with equally many numbers."""
        if self.shape == other.shape:
            products: Tensor = (self.D @ other.D.mT) * (self.X @ other.X.mT)
            return products.flatten(1).sum(1)
        first, second = (g.D.mT @ g.X for g in (self, other))
        return (first.flatten(1) * second.flatten(1)).sum(1)

    def cosines(self, other: _Gradient) -> Tensor:
        lengths = (self.inner(self) * other.inner(other)).clamp_min(0).sqrt()
        return self.inner(other) / torch.where(lengths > 0, lengths, 1.0)


class _Pair(NamedTuple):
    """Two parts to compare, and what the cosine is filed under."""

    kind: str
    label: str
    layer: int
    parts: tuple[str, str]


def _pairs(names: Iterable[str]) -> list[_Pair]:
    rows, _ = grid(dict.fromkeys(names))
    found = [
        _Pair("adjacent", label, layer, (cells[layer], cells[layer + 1]))
        for label, cells in rows.items()
        for layer in sorted(cells)
        if layer + 1 in cells
    ]
    roles: dict[tuple[str, int], dict[str, str]] = {}
    for layer, name in ((layer, name) for cells in rows.values() for layer, name in cells.items()):
        role = next((r for r, pattern in _ROLES.items() if pattern.search(name)), "")
        roles.setdefault((place(name).stack, layer), {}).setdefault(role, name)
    several = len({stack for stack, _ in roles}) > 1
    for (stack, layer), having in sorted(roles.items()):
        for one, other in PAIRS.items():
            if one in having and other in having:
                label = f"{stack} {one}, {other}" if several else f"{one}, {other}"
                found.append(_Pair("same_layer", label, layer, (having[one], having[other])))
    return found


class _Neighbours:
    """Compares what the hooks catch, and lets it go once all its neighbours have come."""

    def __init__(self, layers: Mapping[str, nn.Module], config: Any) -> None:
        self._parts = {name: parts_of(name, layer, config) for name, layer in layers.items()}
        self._pairs = _pairs(part for parts in self._parts.values() for part in parts)
        self._open = set(self._pairs)
        self._held: dict[str, _Gradient] = {}
        self._found: dict[_Pair, Tensor] = {}

    def take(self, name: str, x: Tensor, gradient: Tensor) -> None:
        X, D = x.double(), gradient.double()
        self._held |= {part: _Gradient(D[..., r], X) for part, r in self._parts[name].items()}
        for pair in [p for p in self._open if all(part in self._held for part in p.parts)]:
            self._open.discard(pair)
            one, other = (self._held[part] for part in pair.parts)
            if one.numel == other.numel:
                self._found[pair] = one.cosines(other)
        wanted = {part for pair in self._open for part in pair.parts}
        self._held = {part: g for part, g in self._held.items() if part in wanted}

    def cosines(self, example: int) -> GradientCosines:
        """Of one example, in the order of the layers."""
        kinds: dict[str, dict[str, dict[int, float]]] = {"adjacent": {}, "same_layer": {}}
        for pair in self._pairs:
            if pair in self._found:
                by_layer = kinds[pair.kind].setdefault(pair.label, {})
                by_layer[pair.layer] = float(self._found[pair][example])
        return GradientCosines(**kinds)
