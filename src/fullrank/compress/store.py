"""Shrunk models on disk."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from fullrank.compress.factorization import mark, replace_modules
from fullrank.compress.layers_record import (
    added_biases,
    describe,
    factorised,
    layer_for,
    record_format,
    stands_for,
)
from fullrank.compress.maestro_layers import Ordered
from fullrank.compress.report import sizes
from fullrank.compress.targets import unloadable
from fullrank.core.batches import is_sentence_transformer
from fullrank.core.errors import InputError, StoreError, require
from fullrank.core.files import atomic_write
from fullrank.core.models import quiet_transformers
from fullrank.core.names import canonical_modules

_PLAIN = "fullrank.json"
_FORMAT = 3


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write a shrunk model to a folder, whole or not at all.

    A transformers model or a SentenceTransformer is written by its own ``save_pretrained``:
    after ``import fullrank`` plain ``AutoModel.from_pretrained(folder)`` and
    ``SentenceTransformer(folder)`` load it, without ``trust_remote_code``. Any other module is
    written as its tensors and a list of the factorised layers, for :func:`load` to put into a
    model of the original architecture.

    Raises
    ------
    StoreError
        When ``folder`` exists and is not empty, or what would be in it could not be loaded again:
        a model in training by :class:`~fullrank.compress.Maestro` is exported first.
    """
    target = _new_folder(folder)
    part = target.with_name(f".{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        _write(model, part)
        if target.exists():
            target.rmdir()
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def load(folder: str | Path, into: nn.Module | None = None, **kwargs: Any) -> nn.Module:
    """Load what :func:`save` wrote.

    Parameters
    ----------
    folder
        Of a transformers model, a SentenceTransformer or a plain module.
    into
        For a plain module: a model of the original, dense architecture; changed in place. It may
        be on the meta device.
    kwargs
        Passed on to ``from_pretrained`` or ``SentenceTransformer``, e.g. ``dtype``, ``device``.

    Raises
    ------
    StoreError
        When the folder is no model, or is damaged.
    InputError
        When a plain module is loaded without ``into``.
    """
    path = Path(folder)
    if (path / _PLAIN).is_file():
        if into is None:
            raise InputError(f"{path} holds a plain module; pass the dense model as into=")
        return _load_plain(path, into)
    if (path / "modules.json").is_file():
        library = require("sentence_transformers", extra="hf")
        model: nn.Module = library.SentenceTransformer(str(path), **kwargs)
        return model
    if (path / "config.json").is_file():
        transformers = require("transformers", extra="hf")
        config = transformers.AutoConfig.from_pretrained(path)
        name = (config.architectures or [""])[0]
        cls = getattr(transformers, name, transformers.AutoModel)
        loaded: nn.Module = cls.from_pretrained(path, **kwargs)
        return loaded
    raise StoreError(f"{path} holds no model: there is no config.json, modules.json or {_PLAIN}")


def to_dense(model: nn.Module) -> nn.Module:
    """Multiply all factors out, in place: the dense architecture, at its full size."""
    replace_modules(model, {name: layer.to_dense() for name, layer in factorised(model)})
    mark(model)
    return model


def export_dense(model: nn.Module, folder: str | Path) -> str:
    """Write a shrunk model for use without fullrank, its factors multiplied out.

    Methods that look at data (``"gauss_newton"``, ``"lord"``) give every layer a bias. Where an
    architecture has none there (Llama, T5, ...), its own ``from_pretrained`` would drop it; such a
    model is refused, and :func:`save` is the way.

    Returns
    -------
    str
        A sentence for the user: such a model has the size and speed of the dense one.

    Raises
    ------
    StoreError
        When ``folder`` exists and is not empty, or the architecture would not load all of it.
    """
    _new_folder(folder)
    _check_biases(model)
    layers = [layer for _, layer in factorised(model)]
    dense = to_dense(copy.deepcopy(model))
    path = save(dense, folder)
    full, kept = (sum(sizes(layer)[i] for layer in layers) for i in (0, 1))
    return (
        f"{path}: {len(layers)} layers multiplied out. This model loads without fullrank and has "
        f"the size and speed of the dense one ({full:,} numbers in these layers, not {kept:,})."
    )


def _new_folder(folder: str | Path) -> Path:
    # A folder such as "." has no name to derive that of a part from.
    path = Path(folder).resolve()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise StoreError(f"{path} exists already; give a new folder")
    return path


def _check_biases(model: nn.Module) -> None:
    """Raise where the model's own loader, without fullrank, would drop biases."""
    if not hasattr(model, "save_pretrained"):
        return
    # The modules around a SentenceTransformer's transformers models say whether they have a bias.
    kept = unloadable(model)
    lost = [name for name, layer in added_biases(model) if id(layer.bias) not in kept]
    if lost:
        raise StoreError(
            f"factorising by data gave {len(lost)} layers, e.g. {lost[0]}, a bias that the "
            "architecture has not, and that it would drop without fullrank: save the model as it "
            "is (fullrank.compress.save), or factorise by a method without data (svd, "
            "greenformers, welore, pela), which adds none"
        )


def _write(model: nn.Module, folder: Path) -> None:
    for name, module in canonical_modules(model):
        if isinstance(module, Ordered):
            raise StoreError(
                f"{name} is in training by Maestro, of which only a part is in use: save what "
                "Maestro.export() returns"
            )
    mark(model)
    writer: Any = getattr(model, "save_pretrained", None)
    if writer is None:
        _write_plain(model, folder)
        return
    lost = unloadable(model)
    for name, layer in factorised(model):
        if id(layer.first) in lost:
            raise StoreError(
                f"{name} is outside the transformers model, where SentenceTransformer loads dense "
                "layers only; leave it out of the plan, or use export_dense"
            )
    # The card of a SentenceTransformer names a temporary folder and says nothing we need.
    options = {"create_model_card": False} if is_sentence_transformer(model) else {}
    with quiet_transformers():
        writer(str(folder), **options)


def _write_plain(model: nn.Module, folder: Path) -> None:
    tensors: dict[str, Tensor] = {}
    seen, storages = set(), set()
    for name, tensor in model.state_dict().items():
        # safetensors stores no aliases; a shared tensor is stored under its first name.
        if _identity(tensor) in seen:
            continue
        seen.add(_identity(tensor))
        # Nor does it store parts of a tensor beside it.
        storage = tensor.untyped_storage().data_ptr()
        whole = tensor.detach().contiguous()
        tensors[name] = whole.clone() if storage in storages else whole
        storages.add(storage)
    atomic_write(folder / "model.safetensors", safetensors_bytes(tensors))
    layers = describe(model)
    record = {"format": record_format(layers), "layers": layers}
    atomic_write(folder / _PLAIN, json.dumps(record, indent=1).encode())


def _identity(tensor: Tensor) -> Hashable:
    """What two names of the same numbers have in common."""
    if tensor.is_meta or not tensor.numel():
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _load_plain(path: Path, model: nn.Module) -> nn.Module:
    try:
        record = json.loads((path / _PLAIN).read_text(encoding="utf-8"))
        tensors = load_file(path / "model.safetensors")
        if record["format"] > _FORMAT:
            raise StoreError(f"{path} was written by a newer fullrank: upgrade fullrank")
        layers = record["layers"]
    except (OSError, KeyError, TypeError, json.JSONDecodeError, SafetensorError) as error:
        raise StoreError(f"{path} cannot be read as a shrunk model: {error}") from error
    modules = dict(canonical_modules(model))
    new = {}
    for name, entry in layers.items():
        module = modules.get(name)
        if module is None or not stands_for(entry, module):
            raise StoreError(f"{path} holds {name} {entry['shape']}, which the model given has not")
        new[name] = layer_for(module, entry)
    replace_modules(model, new)
    held = model.state_dict(keep_vars=True)
    stored = {_identity(tensor): tensors[name] for name, tensor in held.items() if name in tensors}
    tensors |= {n: stored[_identity(t)] for n, t in held.items() if _identity(t) in stored}
    built = not any(tensor.is_meta for tensor in held.values())
    try:
        missing, unexpected = model.load_state_dict(
            tensors if built else _in_place_of(held, tensors), strict=False, assign=not built
        )
    except RuntimeError as error:
        raise StoreError(f"{path} does not fit the model given: {error}") from error
    if missing or unexpected:
        found = (missing + unexpected)[0]
        raise StoreError(f"{path} does not fit the model given, e.g. {found!r}")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise StoreError(f"the model given has no numbers for {name}, nor has {path}")
    return model


def _in_place_of(held: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors to assign to a model on the meta device: of its types, shared where its own are."""
    new: dict[int, Tensor] = {}
    for name, old in held.items():
        if name in tensors and id(old) not in new:
            tensor = tensors[name].to(old.dtype)
            parameter = isinstance(old, nn.Parameter)
            new[id(old)] = nn.Parameter(tensor, old.requires_grad) if parameter else tensor
    return {**tensors, **{name: new[id(old)] for name, old in held.items() if id(old) in new}}
