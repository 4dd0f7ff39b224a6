"""What goes with LIFT: param groups for a model, what training changed, a fixed mask for PEFT."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError
from fullrank.core.names import canonical_parameters, named_linears
from fullrank.optim.mask import SVDKind, index_dtype, principal_mask

Delta = dict[str, tuple[Tensor, Tensor]]


def lift_param_groups(
    model: nn.Module,
    exclude: str | Sequence[str] = ("lm_head", "embed"),
    *,
    rank: int = 128,
    lra_rank: int = 128,
    others: bool = True,
    where: Callable[[str, nn.Module], bool] | None = None,
) -> list[dict[str, Any]]:
    """Sort a model's weights as LIFT's scripts do: linear layers are masked.

    Parameters
    ----------
    model
        Any module. Weights of Linear layers (transformers' ``Conv1D`` too) are masked, each
        once; ``lra_rank`` is cut to the shorter side of narrow ones.
    exclude
        Parts of layers' names that are not masked.
    rank, lra_rank
        r and R of :class:`LIFT`.
    others
        Whether other trainable parameters make up a second group, which gets AdamW. The official
        scripts leave them out, and so frozen.
    where
        ``where(name, layer)`` says which of the remaining layers are masked.

    Returns
    -------
    list of dict
        One or two groups.

    Raises
    ------
    InputError
        When no layer is left.

    Examples
    --------
    >>> model = nn.ModuleDict({"mlp": nn.Linear(8, 6), "lm_head": nn.Linear(6, 20)})
    >>> groups = lift_param_groups(model, rank=1, lra_rank=128)
    >>> [tuple(p.shape) for _, p in groups[0]["params"]], groups[0]["lra_rank"]
    ([(6, 8)], [6])
    >>> [name for name, _ in groups[1]["params"]]
    ['mlp.bias', 'lm_head.weight', 'lm_head.bias']
    """
    parts = [exclude] if isinstance(exclude, str) else list(exclude)
    tied = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    chosen: dict[int, tuple[str, Tensor]] = {}
    for name, layer in named_linears(model):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        left_out = id(weight) in tied or any(part in name for part in parts)
        # What a parametrization computes is no leaf, and cannot be stepped.
        steps = weight.is_leaf and weight.requires_grad
        if steps and not left_out and (where is None or where(name, layer)):
            chosen[id(weight)] = (f"{name}.weight".lstrip("."), weight)
    if not chosen:
        raise InputError(
            f"no trainable linear layer is left to mask (exclude={exclude!r}); LIFT needs one"
        )
    weights = list(chosen.values())
    groups: list[dict[str, Any]] = [
        {
            "params": weights,
            "rank": rank,
            "lra_rank": [min(lra_rank, min(weight.shape)) for _, weight in weights],
        }
    ]
    rest = [
        (name, param)
        for name, param in canonical_parameters(model)
        if param.requires_grad and id(param) not in chosen
    ]
    if rest and others:
        groups.append({"params": rest})
    return groups


@torch.no_grad()
def export_delta(model: nn.Module, before: Mapping[str, Tensor]) -> Delta:
    """Return what training has changed in a model, entry by entry.

    Parameters
    ----------
    model
        The model after training.
    before
        Its ``state_dict`` before it, on any device.

    Returns
    -------
    dict
        Name -> (flat indices, new minus old) of every floating-point tensor that differs; int32
        while indices fit, differences in the tensor's dtype, float32 for half precision (where
        the new value is met exactly).

    Raises
    ------
    InputError
        When names or shapes of the two do not agree.

    Examples
    --------
    >>> model = nn.Linear(3, 2, bias=False)
    >>> before = {name: value.clone() for name, value in model.state_dict().items()}
    >>> _ = model.weight.data[1, 2].add_(0.5)
    >>> export_delta(model, before)["weight"][0].tolist()
    [5]
    """
    found: Delta = {}
    after = model.state_dict()
    _check_names(set(after), set(before))
    for name, new in after.items():
        old = before[name].to(new.device)
        if old.shape != new.shape:
            raise InputError(
                f"{name} has shape {tuple(new.shape)}, but {tuple(old.shape)} in before"
            )
        if not new.is_floating_point():
            continue
        new, old = new.reshape(-1), old.reshape(-1)
        indices = (new != old).nonzero().squeeze(1)
        if len(indices):
            wide = torch.promote_types(new.dtype, torch.float32)
            difference = new[indices].to(wide) - old[indices].to(wide)
            found[name] = (indices.to(index_dtype(new.numel())), difference)
    return found


@torch.no_grad()
def apply_delta(model: nn.Module, delta: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Add to a model what :func:`export_delta` has found, in place.

    Raises
    ------
    InputError
        On a name that the model does not have, or an index beyond its tensor; the model is then
        as it was.
    """
    state = model.state_dict()
    _check_names(set(state), set(delta), only_known=True)
    for name, (indices, _) in delta.items():
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < state[name].numel():
            raise InputError(
                f"the delta of {name} reaches beyond its {state[name].numel()} entries"
            )
    for name, (indices, difference) in delta.items():
        target = state[name]
        places = indices.to(target.device).long()
        flat = target.reshape(-1)
        new = flat[places].to(difference.dtype) + difference.to(target.device)
        flat[places] = new.to(flat.dtype)
        if flat.data_ptr() != target.data_ptr():
            target.copy_(flat.view(target.shape))


def _check_names(have: set[str], given: set[str], only_known: bool = False) -> None:
    wrong = sorted(given - have if only_known else given ^ have)
    if wrong:
        raise InputError(f"the model and what was given do not agree about {wrong[0]!r}")


def lift_mask_fn(lra_rank: int, svd: SVDKind = "full") -> Callable[..., Tensor]:
    """Make a mask function for PEFT's SHiRA: LIFT with a mask that is chosen once.

    Parameters
    ----------
    lra_rank
        R of :func:`principal_mask`, cut to a layer's shorter side.
    svd
        As there.

    Returns
    -------
    callable
        ``mask_fn(base_layer, r, **kwargs)`` for ``ShiraConfig.mask_fn``: exactly ``r (m + n)``
        ones in the weight's dtype.

    Examples
    --------
    >>> mask = lift_mask_fn(lra_rank=2)(nn.Linear(16, 12), r=1)
    >>> mask.shape, int(mask.sum())
    (torch.Size([12, 16]), 28)
    """

    def mask_fn(base_layer: nn.Module, r: int, **_: Any) -> Tensor:
        weight = base_layer.weight
        assert isinstance(weight, Tensor)
        mask = principal_mask(weight, r, min(lra_rank, min(weight.shape)), svd=svd)
        return mask.to(weight.dtype)

    return mask_fn
