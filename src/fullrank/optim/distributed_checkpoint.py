"""Room for what a distributed checkpoint holds: it is read into tensors that are there already."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fullrank.core.errors import InputError
from fullrank.core.names import canonical_naming, canonical_parameters
from fullrank.optim.foundation import FullrankOptimizer
from fullrank.optim.mkor import MKOR

if TYPE_CHECKING:
    from torch.distributed.checkpoint.storage import StorageReader

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def allocate_as_saved(
    optimizer: Optimizer,
    checkpoint: str | os.PathLike[str] | StorageReader,
    model: nn.Module | None = None,
    *,
    key: str = "optimizer",
) -> None:
    """Give an optimizer the state tensors that a checkpoint has, of zeros, to be read into.

    ``torch.distributed.checkpoint`` fills tensors of an optimizer that has taken a step, and
    ``get_state_dict`` takes one with gradients of zeros to have them. Where the state is another
    after some hundred steps than after the first, that is not what was saved: blocks of
    :class:`FrugalAdamW`, whose turn changes, and the factors of :class:`MKOR`, which grow. Call
    this first; it reads the checkpoint's table of contents and does no harm to others.

    Parameters
    ----------
    optimizer
        The optimizer that is to continue; any state it has is dropped.
    checkpoint
        The checkpoint's folder, or a ``StorageReader``.
    model
        The model, where states were saved by parameter name (``get_state_dict``). Without it, by
        index: ``dcp.save({"optimizer": optimizer.state_dict()})``, the way for MKOR, of which
        ``get_state_dict`` would leave out the factors.
    key
        Under which the optimizer's state was saved.

    Raises
    ------
    InputError
        When the checkpoint has no state for the optimizer under this key, or for other names.

    Examples
    --------
    >>> import tempfile
    >>> import torch.distributed.checkpoint as dcp
    >>> from fullrank.optim import FrugalAdamW
    >>> weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    >>> def make():
    ...     groups = [{"params": weights, "is_proj_params": True}]
    ...     return FrugalAdamW(groups, density=0.5, update_gap=1)
    >>> first, second = make(), make()
    >>> for _ in range(2):
    ...     sum(w.square().sum() for w in weights).backward()
    ...     _ = first.step()
    >>> folder = tempfile.mkdtemp()
    >>> _ = dcp.save({"optimizer": first.state_dict()}, checkpoint_id=folder, no_dist=True)
    >>> allocate_as_saved(second, folder)
    >>> state = second.state_dict()
    >>> dcp.load({"optimizer": state}, checkpoint_id=folder, no_dist=True)
    >>> second.load_state_dict(state)
    >>> torch.equal(second.state[weights[0]]["exp_avg"], first.state[weights[0]]["exp_avg"])
    True
    """
    saved = _contents(checkpoint)
    states = dict(_owners(saved, f"{key}.state."))
    if model is not None:
        naming = canonical_naming(model)
        states = {naming(name): shapes for name, shapes in states.items()}
    named = dict(_named(optimizer, model))
    foreign = sorted(set(states) - set(named))
    if foreign or not any(path.startswith(f"{key}.") for path in saved):
        have = f"state of {foreign[0]!r}" if foreign else "nothing"
        raise InputError(
            f"the checkpoint has {have} under {key!r}; this optimizer has "
            f"{', '.join(map(repr, list(named)[:3]))}, ... Give model= where it was saved by "
            "parameter name, leave it out otherwise"
        )
    optimizer.state.clear()
    for name, shapes in states.items():
        optimizer.state[named[name]] = {
            each: _zeros(optimizer, each, shape, dtype, named[name])
            for each, (shape, dtype) in shapes.items()
        }
    if isinstance(optimizer, FullrankOptimizer):
        optimizer.forget()
    if isinstance(optimizer, MKOR):
        layers = dict(_owners(saved, f"{key}.mkor.layers."))
        for layer in optimizer.layers:
            shapes = layers.get(layer.name, {})
            layer.load({n: torch.zeros(s, dtype=dtype) for n, (s, dtype) in shapes.items()})


def _contents(checkpoint: Any) -> Mapping[str, Any]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.storage import StorageReader

    reader = checkpoint if isinstance(checkpoint, StorageReader) else FileSystemReader(checkpoint)
    try:
        return reader.read_metadata().state_dict_metadata
    except FileNotFoundError as error:
        raise InputError(f"{checkpoint} holds no distributed checkpoint: {error}") from error


def _owners(saved: Mapping[str, Any], start: str) -> Iterator[tuple[str, Shapes]]:
    """Shapes and dtypes of the tensors below a key, by what they belong to."""
    found: dict[str, Shapes] = {}
    for path, entry in saved.items():
        if path.startswith(start) and hasattr(entry, "properties"):
            owner, _, name = path.removeprefix(start).rpartition(".")
            found.setdefault(owner, {})[name] = tuple(entry.size), entry.properties.dtype
    yield from found.items()


def _named(optimizer: Optimizer, model: nn.Module | None) -> Iterator[tuple[str, Tensor]]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    if model is None:
        yield from ((str(i), param) for i, param in enumerate(params))
        return
    held = {id(param) for param in params}
    yield from ((n, param) for n, param in canonical_parameters(model) if id(param) in held)


def _zeros(
    optimizer: Optimizer, name: str, shape: tuple[int, ...], dtype: torch.dtype, param: Tensor
) -> Tensor:
    owner = optimizer.inner if isinstance(optimizer, MKOR) else optimizer
    if isinstance(owner, FullrankOptimizer):
        return owner.zeros(name, shape, dtype, param)
    return torch.zeros(shape, dtype=dtype, device=param.device if shape else "cpu")
