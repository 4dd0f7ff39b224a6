"""Which layers a training method works on: linear ones and convolutions, by name."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase

from torch import nn

from fullrank.compress import targets
from fullrank.compress.targets import Patterns, as_patterns, output_head, shared_weights
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_modules


def is_convolution(module: nn.Module) -> bool:
    """Whether this is a convolution in one group, not transposed, with its own weight."""
    return targets.is_convolution(module) and bool(module.groups == 1)


def training_targets(
    model: nn.Module,
    include: Patterns | None = None,
    exclude: Patterns = (),
    usual: Callable[[nn.Module], bool] = lambda module: True,
) -> dict[str, nn.Module]:
    """Linear layers and convolutions of a model, by canonical name, each weight once.

    Parameters
    ----------
    model
        Any module.
    include, exclude
        Shell patterns over canonical names. Without ``include`` every layer counts that is
        ``usual``, except the output head of a language model. A layer whose weight another module
        holds too is never among them.
    usual
        What to take without being told.

    Raises
    ------
    InputError
        When a pattern matches no such layer, or none is left.

    Examples
    --------
    >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    >>> list(training_targets(model)), list(training_targets(model, exclude="3"))
    (['0', '3'], ['0'])
    """
    modules = dict(canonical_modules(model))
    shared = shared_weights(model)
    layers = {
        name: module
        for name, module in targets.all_layers(model).items()
        if (targets.is_linear(module) or is_convolution(module)) and id(module.weight) not in shared
    }
    wanted, unwanted = as_patterns(include), as_patterns(exclude)
    for pattern in [*wanted, *unwanted]:
        if not any(fnmatchcase(name, pattern) for name in layers):
            raise InputError(_missing(pattern, modules, layers))
    head = output_head(model)

    def taken(name: str, module: nn.Module) -> bool:
        if any(fnmatchcase(name, pattern) for pattern in unwanted):
            return False
        if wanted:
            return any(fnmatchcase(name, pattern) for pattern in wanted)
        return usual(module) and module is not head

    found = {name: module for name, module in layers.items() if taken(name, module)}
    if not found:
        raise InputError("the model has no layer of the kind this method works on; name some")
    return found


def _missing(pattern: str, modules: dict[str, nn.Module], layers: dict[str, nn.Module]) -> str:
    for name, module in modules.items():
        if fnmatchcase(name, pattern):
            return (
                f"{name!r} is a {type(module).__name__}; linear layers and convolutions in one "
                "group, with weights of their own, are expected"
            )
    known = ", ".join(list(layers)[:3]) or "none"
    return f"no layer is named like {pattern!r}; linear and convolutional ones: {known}, ..."
