"""Adapters as ordinary LoRA files, which PEFT loads on a fresh base without this package."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fullrank.core.errors import InputError, require
from fullrank.core.files import atomic_write

# What a LoRA configuration may train beside factors of linear layers, and when it does not.
_BESIDE = {
    "bias": "none",
    "lora_bias": False,
    "target_parameters": None,
    "trainable_token_indices": None,
    "modules_to_save": None,
}
# By what a LoRA configuration acts otherwise than by adding to the layers of its base.
_OTHERWISE = {
    "alora_invocation_tokens": "acts from certain tokens on",
    "layer_replication": "repeats layers of its base",
}


class LowRank(NamedTuple):
    """An update ``B A`` of a weight ``(out, in)``: A is ``(r, in)``, B ``(out, r)``."""

    A: Tensor
    B: Tensor


def exact_targets(names: Iterable[str], others: Iterable[str] | None = None) -> list[str] | str:
    """``target_modules`` of PEFT that mean these modules and no others.

    PEFT reads the items of a list as ends of names: ``"q"`` also means ``"block.q"``. Where that
    may happen, the answer is a regular expression instead. Without ``others``, the remaining
    modules of the model, it may happen to any name without a dot.

    >>> exact_targets(["block.q", "block.k"]), exact_targets(["q"], ["q.bias", "p"])
    (['block.k', 'block.q'], ['q'])
    >>> exact_targets(["q"], ["block.q"])
    'q'
    """
    wanted = sorted(names)
    if others is None:
        unclear = any("." not in name for name in wanted)
    else:
        rest = set(others) - set(wanted)
        unclear = any(other.endswith(f".{name}") for other in rest for name in wanted)
    return "|".join(map(re.escape, wanted)) if unclear else wanted


def exactly(name: str) -> str:
    """A key of PEFT's patterns for one module, with PEFT's prefix or without.

    PEFT reads keys as ends of names: ``"q"`` also means ``"block.q"``.
    """
    return r"(?:^|(?<=^base_model\.model\.))" + name.replace(".", r"\.")


def trained_beside(config: Any) -> list[str]:
    """Settings by which a configuration trains more than factors of linear layers."""
    return [
        name for name, none in _BESIDE.items() if getattr(config, name, None) not in (none, None)
    ]


def check_plain(settings: Mapping[str, Any], what: str) -> None:
    """Raise where a LoRA does more than plain factors can say: act at times, repeat layers.

    >>> check_plain({"layer_replication": [(0, 2), (0, 2)]}, "tuned")
    Traceback (most recent call last):
        ...
    fullrank.core.errors.InputError: tuned repeats layers of its base (layer_replication), ...
    """
    for name, how in _OTHERWISE.items():
        if settings.get(name):
            raise InputError(
                f"{what} {how} ({name}), which plain factors cannot say; keep it as PEFT saves it"
            )


def write_lora(
    folder: str | Path,
    updates: Mapping[str, LowRank],
    config: Any,
    whole: Mapping[str, Tensor] | None = None,
    beside: Mapping[str, bytes] | None = None,
    biases: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write low-rank updates as a LoRA adapter, whole or not at all.

    Parameters
    ----------
    folder
        Where to write ``adapter_config.json`` and ``adapter_model.safetensors``.
    updates
        Name of a module of the base model -> its update, scaling included. Ranks may differ.
    config
        A ``LoraConfig`` whose base model, task and revision are kept.
    whole
        Tensors of modules that were trained whole, as :func:`trained_whole` gives them.
    beside
        Other files to write with it, by name.
    biases
        Name of a module -> what is added to its output whatever the input, ``(out,)``: the file is
        one of PEFT's ``lora_bias``.

    Raises
    ------
    InputError
        When there is nothing to write, or shapes do not fit.

    Examples
    --------
    >>> import tempfile
    >>> import peft
    >>> update = LowRank(torch.ones(2, 3), torch.ones(4, 2))
    >>> folder = write_lora(tempfile.mkdtemp() + "/lora", {"fc": update}, peft.LoraConfig())
    >>> sorted(path.name for path in folder.iterdir())
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    peft = require("peft", extra="adapters")
    from safetensors.torch import save

    if not updates:
        raise InputError("there is no update to write")
    for name, (A, B) in updates.items():
        if A.ndim != 2 or B.ndim != 2 or A.shape[0] != B.shape[1]:
            raise InputError(f"{name}: factors of shapes {tuple(B.shape)} and {tuple(A.shape)}")
    ranks = {name: len(update.A) for name, update in updates.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    # alpha = r makes PEFT's scaling 1.
    plain = peft.LoraConfig(
        r=usual,
        lora_alpha=usual,
        target_modules=exact_targets(updates),
        rank_pattern={f"^{name}$".replace(".", r"\."): rank for name, rank in others.items()},
        alpha_pattern={f"^{name}$".replace(".", r"\."): rank for name, rank in others.items()},
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        fan_in_fan_out=getattr(config, "fan_in_fan_out", False),
        modules_to_save=config.modules_to_save if whole else None,
        lora_bias=bool(biases),
        inference_mode=True,
    )
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (whole or {}).items()}
    for name, (A, B) in updates.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.detach().cpu().contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.detach().cpu().contiguous()
        if biases:
            bias = biases.get(name, B.new_zeros(len(B))).to(B)
            tensors[f"base_model.model.{name}.lora_B.bias"] = bias.detach().cpu().contiguous()
    target = Path(folder)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        atomic_write(part / "adapter_model.safetensors", save(tensors, {"format": "pt"}))
        for name, content in (beside or {}).items():
            atomic_write(part / name, content)
        plain.save_pretrained(str(part))
        target.mkdir(parents=True, exist_ok=True)
        for path in sorted(part.iterdir(), key=lambda p: p.name == "adapter_config.json"):
            path.replace(target / path.name)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def trained_whole(model: Any, adapter: str) -> dict[str, Tensor]:
    """Tensors of PEFT's ``modules_to_save``, such as a classifier, by their name in a file."""
    peft = require("peft", extra="adapters")
    wrappers = require("peft.utils.other", extra="adapters").ModulesToSaveWrapper
    names = [name for name, module in model.named_modules() if isinstance(module, wrappers)]
    state = peft.get_peft_model_state_dict(model, adapter_name=adapter)
    return {key: t for key, t in state.items() if any(key.startswith(f"{n}.") for n in names)}


@torch.no_grad()
def update_of(layer: Any, adapter: str) -> LowRank:
    """Return the update of PEFT's LoRA layer, scaling included in ``B``."""
    A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return LowRank(A.clone(), B * layer.scaling[adapter])
