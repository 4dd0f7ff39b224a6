"""What a layer's weight gradient is made of, caught on its way: inputs, and gradients of outputs.

``G = sum_t delta_t x_t^T`` of a linear layer has rank at most the number of tokens. Its singular
values are those of a small matrix, so that no weight gradient is ever made: this works with frozen
and quantised weights, under adapters, and for each example of a batch by itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError
from fullrank.core.names import is_linear_like, named_linears, stored_weight
from fullrank.linalg import gram_spectrum

Modules = str | Callable[[str, nn.Module], bool]
Method = Literal["auto", "grad", "factored"]
Consume = Callable[[str, Tensor, Tensor], None]
"""Layer -> its inputs ``(..., in)`` and the gradients of its outputs ``(..., out)``."""

_ATTENTION = r"(^|[._])(self_attn|self_attention|attention|attn)([._]|$)"


def chosen_layers(model: nn.Module, modules: Modules) -> dict[str, nn.Module]:
    """Linear layers by canonical name.

    Parameters
    ----------
    model
        A language model, whatever wraps it.
    modules
        ``"attention"`` for the projections of attention, a regular expression that is searched in
        names, or a function of name and module.

    Raises
    ------
    InputError
        When nothing is chosen (names some of the layers that there are), or ``modules`` is no
        regular expression.
    """
    linears = dict(named_linears(model))
    if callable(modules):
        found = {name: layer for name, layer in linears.items() if modules(name, layer)}
    else:
        pattern = _pattern(_ATTENTION if modules == "attention" else modules)
        found = {name: layer for name, layer in linears.items() if pattern.search(name)}
    found = {name: layer for name, layer in found.items() if not _adapter(name)}
    if not found:
        raise InputError(
            f"no linear layer matches modules={modules!r}; the model has "
            f"{', '.join(list(linears)[:4]) or 'none'}, ...: give a regular expression over names"
        )
    return found


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise InputError(f"modules={text!r} is no regular expression: {error}") from error


def _adapter(name: str) -> bool:
    return re.search(r"\.(lora|randlora|lorasb|flylora|hydra)_", name) is not None


@contextmanager
def caught(
    model: nn.Module, layers: Mapping[str, nn.Module], consume: Consume, *, together: bool = False
) -> Iterator[None]:
    """Hand over inputs and output gradients of layers while a backward pass goes through them.

    A weight that linear layers use several times is handed over once, with the tokens of all its
    uses: of all examples in one where ``together``, else of each by itself, which cannot be told
    where one use is of all. No parameter asks for a gradient meanwhile, so that none is made; flags
    and gradients are afterwards as they were.
    """
    flags = [(p, p.requires_grad) for p in model.parameters()]
    uses = {
        id(stored_weight(layer)): _Uses(name, consume, together) for name, layer in layers.items()
    }
    handles = [
        layer.register_forward_hook(uses[id(stored_weight(layer))].watch, with_kwargs=True)
        for layer in model.modules()
        if is_linear_like(layer) and id(stored_weight(layer)) in uses
    ]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        yield
        for each in uses.values():
            each.hand_over()
    finally:
        for handle in handles:
            handle.remove()
        for parameter, wanted in flags:
            parameter.requires_grad_(wanted)


class _Uses:
    """Inputs and output gradients of one weight, from every place where it is used."""

    def __init__(self, name: str, consume: Consume, together: bool) -> None:
        self._name, self._consume, self._together = name, consume, together
        self._open = 0
        self._caught: list[tuple[Tensor, Tensor]] = []

    def watch(
        self, _: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Tensor
    ) -> Tensor:
        """Forward hook."""
        x = next(iter((*args, *named.values()))).detach()
        # With frozen weights the graph begins here. What an adapter adds to in place must be no
        # leaf of it.
        out = output if output.requires_grad else output.detach().requires_grad_(True).clone()
        watched: Any = out  # torch's register_hook has no types
        watched.register_hook(lambda gradient: self._take(x, gradient.detach()))
        self._open += 1
        return out

    def _take(self, x: Tensor, gradient: Tensor) -> None:
        self._caught.append((x, gradient))
        self._open -= 1
        if not self._open:
            self.hand_over()

    def hand_over(self) -> None:
        """Pass on what there is; at the end, where an output did not take part in the loss."""
        if len(self._caught) > 1:
            if self._together:
                self._caught = [(x.flatten(0, -2), d.flatten(0, -2)) for x, d in self._caught]
            elif len({x.shape[:-2] for x, _ in self._caught}) > 1:
                raise InputError(
                    f"{self._name} is also used for all examples at once (relative positions, "
                    "say): what each example does to it cannot be told; leave it out by modules="
                )
            inputs, gradients = (torch.cat(each, -2) for each in zip(*self._caught, strict=True))
            self._consume(self._name, inputs, gradients)
        elif self._caught:
            self._consume(self._name, *self._caught[0])
        self._caught = []


class Factor:
    """Inputs of a layer ``X (T, n)`` as far as singular values need them; layers share them."""

    def __init__(self, X: Tensor) -> None:
        self.X = X
        self._R: Tensor | None = None

    def values(self, D: Tensor, method: Method) -> Tensor:
        """Singular values of ``D^T X`` for output gradients ``D (T, m)``.

        ``X^T = Q_X R_X`` gives ``G = (R_X D)^T Q_X^T``: with fewer tokens than the matrix is wide
        the ``T x m`` matrix ``R_X D`` is all there is to decompose.
        """
        tokens, least = len(D), min(D.shape[1], self.X.shape[1])
        factored = tokens < least if method == "auto" else method == "factored"
        found = _singular_values(self._upper() @ D if factored else D.T @ self.X)
        # As many as the weight has, whatever was decomposed.
        return nn.functional.pad(found[:least], (0, max(0, least - len(found))))

    def _upper(self) -> Tensor:
        """``R`` of ``X^T = Q R``, which holds all inner products of the inputs."""
        if self._R is None:
            self._R = torch.linalg.qr(self.X.T, mode="r").R
        return self._R


def _singular_values(matrix: Tensor) -> Tensor:
    """In float64 for float32, whose squares it keeps; NaN where the matrix is not finite."""
    try:
        if matrix.dtype == torch.float32:
            return gram_spectrum(matrix).to(matrix.device)
        if matrix.isfinite().all():
            found: Tensor = torch.linalg.svdvals(matrix)
            return found
    except ValueError:  # not finite
        pass
    return matrix.new_full((min(matrix.shape),), torch.nan)
