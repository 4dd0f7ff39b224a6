"""Which layers of a model can be factorised."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fullrank.compress.matrices import is_conv1d
from fullrank.core.errors import InputError
from fullrank.core.names import named_linears

Patterns = str | Sequence[str]


def shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that two different modules hold (tied embeddings and heads)."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


def factorisable(
    model: nn.Module, include: Patterns | None = None, exclude: Patterns = ()
) -> dict[str, nn.Module]:
    """Layers of a model that can be factorised, by canonical name, tied ones once.

    Parameters
    ----------
    model
        Any module.
    include, exclude
        Shell patterns over canonical names. Without ``include`` every ``nn.Linear`` and
        ``Conv1D`` counts except the output head of a language model. A layer whose weight
        another module holds too is never among them.

    Raises
    ------
    InputError
        When a pattern matches nothing, or the model has no such layer.

    Examples
    --------
    >>> list(factorisable(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), exclude="2"))
    ['0']
    """
    linears = {
        name: module
        for name, module in named_linears(model)
        # A subclass may use its weight in ways of its own (attention does, quantisation does).
        if type(module) is nn.Linear or is_conv1d(module)
    }
    if not linears:
        raise InputError("the model has no linear layer to factorise")
    wanted = _patterns(include)
    unwanted = _patterns(exclude)
    for pattern in [*wanted, *unwanted]:
        if not any(fnmatchcase(name, pattern) for name in linears):
            raise InputError(
                f"no linear layer is named like {pattern!r}; there are "
                f"{', '.join(list(linears)[:3])}"
                f"{', ...' if len(linears) > 3 else ''}"
            )
    shared = shared_weights(model)
    head = None if wanted else _output_head(model)
    return {
        name: module
        for name, module in linears.items()
        if (not wanted or any(fnmatchcase(name, p) for p in wanted))
        and not any(fnmatchcase(name, p) for p in unwanted)
        and module is not head
        and id(module.weight) not in shared
    }


def _patterns(value: Patterns | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None
