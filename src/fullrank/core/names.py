"""One name for a module, whatever wraps the model it is in."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, nn

# What wrappers put in front of, or inside, the names of the model they wrap.
_INSIDE = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PREFIX = re.compile(
    r"^(?:module\."  # DDP
    r"|base_model\.model\."  # PEFT
    r"|0\.(?:auto_model|model)\.)"  # SentenceTransformer, whose first module holds the model
)
# Parameters of PEFT's LoRA layers, and of our own tuners'.
_ADAPTER = re.compile(r"\.(?:lora|lorasb|randlora|flylora|hydra)_[A-Za-z_]+\.")
# PEFT keeps the wrapped layer as `base_layer` beside its own parameters.
_BASE_LAYER = re.compile(r"\.base_layer(?=\.|$)")


def canonical_name(name: str) -> str:
    """Strip what SentenceTransformer, PEFT, DDP, FSDP and ``torch.compile`` add to a name.

    >>> canonical_name("module._orig_mod.0.auto_model.encoder.layer.3.output.dense")
    'encoder.layer.3.output.dense'
    >>> canonical_name("base_model.model.lm.q_proj.base_layer.weight")
    'lm.q_proj.weight'
    """
    stripped = _within(name)
    while (shorter := _PREFIX.sub("", stripped)) != stripped:
        stripped = shorter
    return stripped


def _within(name: str) -> str:
    return _BASE_LAYER.sub("", _INSIDE.sub("", name))


def canonical_naming(model: nn.Module) -> Callable[[str], str]:
    """Return what gives modules and parameters of this model their canonical names.

    A model may have attributes that are named as a wrapper's are. Where two modules with
    parameters of their own would get one name, nothing is wrapped and such prefixes stay.
    """
    owners: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if any(parameter is not None for parameter in module._parameters.values()):
            owners.setdefault(canonical_name(name), set()).add(_within(name))
    clash = any(len(names) > 1 for names in owners.values())
    return _within if clash else canonical_name


def canonical_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(canonical name, module)`` of every module, shared ones once.

    >>> from torch import nn
    >>> inner = nn.ModuleDict({"model": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))})
    >>> [name for name, module in canonical_modules(nn.Sequential(inner))][-2:]
    ['0', '1']
    >>> [name for name, module in canonical_modules(nn.Sequential(inner, nn.Linear(4, 4)))][-3:]
    ['0.model.0', '0.model.1', '1']
    """
    naming = canonical_naming(model)
    for name, module in model.named_modules():
        yield naming(name), module


def canonical_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield ``(canonical name, parameter)`` of every parameter, shared ones once."""
    naming = canonical_naming(model)
    for name, parameter in model.named_parameters():
        yield naming(name), parameter


def named_linears(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``(canonical name, module)`` of every Linear-like layer, tied layers once.

    Linear-like is ``nn.Linear`` and transformers' ``Conv1D`` (whose weight is transposed).
    """
    seen: set[int] = set()
    for name, module in canonical_modules(model):
        if is_linear_like(module):
            weight = stored_weight(module)
            if id(weight) not in seen:
                seen.add(id(weight))
                yield name, module


def is_linear_like(module: nn.Module) -> bool:
    """Whether this is ``nn.Linear`` or transformers' ``Conv1D``."""
    from torch import nn

    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def stored_weight(module: nn.Module) -> Tensor:
    """Return the tensor that a layer keeps: its weight, or what a parametrization computes it from.

    A weight that is computed is another tensor each time, so that its identity says nothing.
    """
    computed: Any = getattr(module, "parametrizations", {})
    if "weight" in computed:
        for kept in computed["weight"].parameters(recurse=False):
            return cast("Tensor", kept)
    return cast("Tensor", module.weight)


def model_fingerprint(model: nn.Module) -> str:
    """Sixteen hex digits that tell one architecture from another.

    Names and shapes of the parameters count, values do not: what was measured on a model may be
    applied to its fine-tuned sister, never to a model of another shape. What adapters add does
    not count.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(
        (canonical_name(name), tuple(parameter.shape))
        for name, parameter in model.named_parameters()
        if not _ADAPTER.search(name)
    ):
        digest.update(f"{name}{parameter}".encode())
    return digest.hexdigest()[:16]
