"""Which layers of a model can be factorised."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from fullrank.compress.matrices import is_conv1d
from fullrank.compress.matrices_conv import CONVOLUTIONS
from fullrank.core.batches import is_sentence_transformer
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_modules, stored_weight

Patterns = str | Sequence[str]

_CALLED_BY_OTHERS = nn.modules.linear.NonDynamicallyQuantizableLinear
# Subclasses of nn.Linear whose own forward is x W^T + b again.
_LINEAR_BY_NAME = {"FalconLinear"}


def shared_weights(model: nn.Module) -> set[int]:
    """Identities of parameters that two different modules hold (tied embeddings and heads)."""
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
    return {parameter for parameter, modules in owners.items() if len(modules) > 1}


def shares(module: nn.Module, shared: set[int]) -> bool:
    """Whether one of a layer's own parameters is among these: new ones would be untied."""
    return any(id(parameter) in shared for parameter in module.parameters(recurse=False))


def factorisable(
    model: nn.Module,
    include: Patterns | None = None,
    exclude: Patterns = (),
    *,
    convolutions: bool = True,
) -> dict[str, nn.Module]:
    """Layers of a model that can be factorised, by canonical name, tied ones once.

    Parameters
    ----------
    model
        Any module.
    include, exclude
        Shell patterns over canonical names. Without ``include`` every ``nn.Linear``, ``Conv1D``
        and convolution counts except the output head of a language model. A layer whose weight or
        bias another module holds too is never among them, nor is one of a SentenceTransformer
        that is in none of its transformers models (a ``Dense`` module's): it could not be loaded
        again.
        What counts as linear says :func:`is_linear`.
    convolutions
        Whether ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` count.

    Raises
    ------
    InputError
        When a pattern matches nothing, or the model has no such layer.

    Warns
    -----
    UserWarning
        Of subclasses of ``nn.Linear`` that compute in a way of their own, and are left out.

    Examples
    --------
    >>> list(factorisable(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), exclude="2"))
    ['0']
    """
    layers = all_layers(model, convolutions=convolutions)
    kinds = "linear layer or convolution" if convolutions else "linear layer"
    if not layers:
        raise InputError(f"the model has no {kinds} to factorise")
    wanted = as_patterns(include)
    unwanted = as_patterns(exclude)
    for pattern in [*wanted, *unwanted]:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise InputError(
                f"no {kinds} is named like {pattern!r}; there are "
                f"{', '.join(list(layers)[:3])}"
                f"{', ...' if len(layers) > 3 else ''}"
            )
    shared = shared_weights(model)
    head = None if wanted else output_head(model)
    return {
        name: module
        for name, module in layers.items()
        if (not wanted or any(fnmatchcase(name, p) for p in wanted))
        and not any(fnmatchcase(name, p) for p in unwanted)
        and module is not head
        and not shares(module, shared)
    }


def all_layers(model: nn.Module, *, convolutions: bool = True) -> dict[str, nn.Module]:
    """Every layer of a model that patterns may name, by canonical name, tied ones once."""
    layers, seen, own = {}, unloadable(model), {}
    for name, module in canonical_modules(model):
        if is_linear(module) or (convolutions and is_convolution(module)):
            weight = stored_weight(module)
            if id(weight) not in seen:
                layers[name] = module
            seen.add(id(weight))
        elif isinstance(module, nn.Linear) and not _forward_is_linear(module):
            own[name] = type(module).__name__
    if own:
        first = next(iter(own))
        warnings.warn(
            f"{len(own)} layers are left out, e.g. {first}: a {own[first]} is an nn.Linear with a "
            "forward of its own",
            stacklevel=3,
        )
    return layers


def unloadable(model: nn.Module) -> set[int]:
    """Identities of weights that a SentenceTransformer's own loader takes only as they are.

    The modules around its transformers models are built dense, from their classes' settings.
    """
    if not is_sentence_transformer(model):
        return set()
    loadable = {
        id(parameter)
        for module in model.modules()
        if any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)
        for parameter in module.parameters()
    }
    return {id(parameter) for parameter in model.parameters()} - loadable


def is_linear(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D``, or an ``nn.Linear`` that is called as one.

    Of its subclasses those that inherit ``forward``, or are known to compute the same: not
    quantised layers, nor LoRA's. Left out are also the output projection of
    ``nn.MultiheadAttention``, whose weight is used without a call, and layers whose weight is
    made anew at every step (weight normalisation).
    """
    if is_conv1d(module):
        return True
    return (
        isinstance(module, nn.Linear)
        and not isinstance(module, (_CALLED_BY_OTHERS, nn.LazyLinear))
        and _forward_is_linear(module)
        and "weight" in module._parameters
    )


def _forward_is_linear(module: nn.Module) -> bool:
    kind = type(module)
    return kind.forward is nn.Linear.forward or kind.__name__ in _LINEAR_BY_NAME


def is_convolution(module: nn.Module) -> bool:
    """Whether this is one of torch's convolutions itself, not transposed, with its own weight."""
    # Weight normalisation makes the weight anew from other parameters at every step.
    return type(module) in CONVOLUTIONS and "weight" in module._parameters


def as_patterns(value: Patterns | None) -> list[str]:
    """Return one pattern or several as a list."""
    return [value] if isinstance(value, str) else list(value or ())


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output layer of a language model, None where there is none."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if callable(getter) else None
