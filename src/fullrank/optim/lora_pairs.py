"""LoRA's pairs of factors: which they are in a model, and by what their product is scaled."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError
from fullrank.core.names import canonical_name
from fullrank.optim.batching import batches
from fullrank.optim.foundation import Entry


@dataclass(frozen=True, slots=True)
class LoraPair:
    """Two factors of ``W = W0 + scaling * B A``.

    Attributes
    ----------
    A
        ``(r, n)``; for a convolution ``(r, c, k, k)``, read as ``(r, c k k)``.
    B
        ``(m, r)``; for a convolution ``(m, r, 1, 1)``.
    scaling
        s: ``alpha / r``, with rsLoRA ``alpha / sqrt(r)``.
    base
        The frozen weight, where it is to decay too.
    name
        What to call the pair in messages.
    """

    A: Tensor
    B: Tensor
    scaling: float
    base: Tensor | None = None
    name: str = "a pair"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(m, n, r), with a convolution's kernel counted to n."""
        return len(self.B), self.A[0].numel(), len(self.A)


def check_pair(pair: LoraPair) -> None:
    """Raise :class:`InputError` on factors that are no pair, or not whole."""
    for letter, factor in (("A", pair.A), ("B", pair.B)):
        if hasattr(factor, "full_tensor") or hasattr(factor, "ds_id"):
            raise InputError(
                f"{letter} of {pair.name} is sharded; the adjustment needs whole factors. Keep "
                "the adapter out of FSDP or ZeRO-3 (it is small), or use DDP"
            )
        if factor.dim() < 2 or factor.numel() == 0:
            raise InputError(
                f"{letter} of {pair.name} has shape {tuple(factor.shape)}: flattened or sharded? "
                "The adjustment needs whole factors; build the optimizer from the unwrapped model"
            )
    if pair.B[0].numel() != len(pair.A):
        raise InputError(
            f"A of {pair.name} has shape {tuple(pair.A.shape)} and B {tuple(pair.B.shape)}; "
            "expected (r, n) and (m, r)"
        )
    if pair.A.dtype != pair.B.dtype or pair.A.device != pair.B.device:
        raise InputError(
            f"A of {pair.name} is {pair.A.dtype} on {pair.A.device}, B {pair.B.dtype} on "
            f"{pair.B.device}; they must agree"
        )
    scaling = pair.scaling
    if not isinstance(scaling, int | float) or not 0 < abs(scaling) < float("inf"):
        raise InputError(f"scaling={scaling!r} of {pair.name}; it must be a finite number but 0")


def as_pairs(pairs: Iterable[Any]) -> list[LoraPair]:
    """Read pairs as users write them: :class:`LoraPair`, ``(A, B, scaling[, base])``, or dicts.

    Raises
    ------
    InputError
        On anything else, for instance a model's parameters in a row.

    Examples
    --------
    >>> as_pairs([(torch.zeros(2, 8), torch.zeros(4, 2), 2.0)])[0].shape
    (4, 8, 2)
    """
    found = []
    for i, pair in enumerate(pairs):
        if isinstance(pair, LoraPair):
            found.append(pair)
            continue
        if isinstance(pair, Mapping) and {"A", "B", "scaling"} <= set(pair):
            pair = tuple(pair[k] for k in ("A", "B", "scaling", "base") if k in pair)
        if not isinstance(pair, tuple | list) or len(pair) not in (3, 4):
            raise InputError(
                f"item {i} is {type(pair).__name__}; expected a model with LoRA layers, or pairs "
                "(A, B, scaling) or (A, B, scaling, base weight)"
            )
        if not (isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor)):
            raise InputError(f"item {i}: A and B must be tensors; expected (A, B, scaling)")
        base = pair[3] if len(pair) == 4 else None
        found.append(LoraPair(pair[0], pair[1], pair[2], base, f"pair {i}"))
    return found


def pairs_of(model: nn.Module) -> list[LoraPair]:
    """Trainable pairs of a model's LoRA layers, module by module and adapter by adapter.

    The layers are PEFT's, or any module with ``lora_A``, ``lora_B`` (adapter name -> module with
    a weight) and ``scaling`` (adapter name -> number): ranks, scalings and rsLoRA are each
    layer's own.

    Raises
    ------
    InputError
        When one half of a pair is trained and the other is not.

    Warns
    -----
    UserWarning
        On trainable LoRA factors whose product is no plain matrix: of embeddings, grouped
        convolutions, mixtures of experts, AdaLoRA. They are no pairs here.
    """
    found: list[LoraPair] = []
    left_out: list[str] = []
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name in _embeddings(module):
            left_out.append(f"{canonical_name(path)} ({name}: an embedding)")
        for name in _adapters(module):
            label = f"{canonical_name(path)} ({name})"
            A = getattr(module.lora_A[name], "weight", None)
            B = getattr(module.lora_B[name], "weight", None)
            if not (isinstance(A, Tensor) and isinstance(B, Tensor)):
                left_out.append(label)
                continue
            if A.requires_grad != B.requires_grad:
                raise InputError(
                    f"of the LoRA pair of {label} only one half requires a gradient; train both, "
                    "or neither"
                )
            if not A.requires_grad:
                continue
            if not _plain(module, A, B):
                left_out.append(label)
                continue
            if id(A) in seen or id(B) in seen:
                continue
            seen.update((id(A), id(B)))
            found.append(LoraPair(A, B, float(module.scaling[name]), _base(module), label))
    if left_out:
        more = f" and {len(left_out) - 1} more" if len(left_out) > 1 else ""
        warnings.warn(
            f"the LoRA factors of {left_out[0]}{more} are no plain pair of matrices: they are "
            "stepped without LoRA-Pro's adjustment",
            stacklevel=4,
        )
    return found


def _adapters(module: nn.Module) -> Iterator[str]:
    A: Any = getattr(module, "lora_A", None)
    B: Any = getattr(module, "lora_B", None)
    scaling = getattr(module, "scaling", None)
    if isinstance(scaling, Mapping) and hasattr(A, "keys") and hasattr(B, "keys"):
        yield from (name for name in A.keys() if name in B.keys() and name in scaling)  # noqa: SIM118


def _embeddings(module: nn.Module) -> Iterator[str]:
    factors = getattr(module, "lora_embedding_A", None)
    if isinstance(factors, nn.ParameterDict):
        yield from (name for name, factor in factors.items() if factor.requires_grad)


def _plain(module: nn.Module, A: Tensor, B: Tensor) -> bool:
    """Whether the layer adds ``s B A`` and nothing that splits either of them."""
    if getattr(module, "num_experts", 1) != 1 or hasattr(module, "lora_E"):
        return False
    # Flattened factors are for check_pair to name.
    return B.dim() < 2 or A.dim() < 2 or B[0].numel() == len(A)


def _base(module: nn.Module) -> Tensor | None:
    getter: Any = getattr(module, "get_base_layer", None)
    layer = module if getter is None else getter()
    weight = getattr(layer, "weight", None)
    return weight if isinstance(weight, Tensor) else None


def check_base(pair: LoraPair) -> Tensor:
    """Return the frozen weight of a pair, which is to decay.

    Raises
    ------
    InputError
        When there is none, or one that cannot be scaled: quantised, or of another size.
    """
    m, n, _ = pair.shape
    base = pair.base
    if base is None or not base.is_floating_point() or base.numel() != m * n:
        what = "no base weight" if base is None else f"one of {base.dtype}, {tuple(base.shape)}"
        raise InputError(
            f"decay_base=True, but {pair.name} has {what}; it must be a floating-point weight "
            f"of {m} x {n}"
        )
    return base


def warn_half_precision(pairs: Iterable[LoraPair]) -> None:
    """Adapters in half precision lose most updates to rounding."""
    half = [pair for pair in pairs if pair.A.dtype in (torch.bfloat16, torch.float16)]
    if half:
        warnings.warn(
            f"{half[0].name} is of {half[0].A.dtype}, which rounds small updates away; keep the "
            "factors in float32 (PEFT does with autocast_adapter_dtype=True), also on a base "
            "model in half precision",
            stacklevel=4,
        )


def sorted_groups(pairs_or_model: nn.Module | Iterable[Any]) -> tuple[list[LoraPair], list[Any]]:
    """Return the pairs, and param groups: one of their factors, one of what else is trainable."""
    if not isinstance(pairs_or_model, nn.Module):
        pairs = _checked(as_pairs(pairs_or_model))
        return pairs, [{"params": [half for pair in pairs for half in (pair.A, pair.B)]}]
    pairs = _checked(pairs_of(pairs_or_model))
    named = dict(pairs_or_model.named_parameters())
    names = {id(param): name for name, param in named.items()}
    halves = [half for pair in pairs for half in (pair.A, pair.B)]
    taken = {id(half) for half in halves}
    groups: list[Any] = [{"params": [(names[id(half)], half) for half in halves]}]
    others = [(n, p) for n, p in named.items() if p.requires_grad and id(p) not in taken]
    if others:
        groups.append({"params": others})
    return pairs, groups


def _checked(pairs: list[LoraPair]) -> list[LoraPair]:
    if not pairs:
        raise InputError(
            "no trainable LoRA pair was found; LoRAPro steps the factors of LoRA layers, so add "
            "an adapter first (peft.get_peft_model with a LoraConfig)"
        )
    for pair in pairs:
        check_pair(pair)
    return pairs


@dataclass(slots=True)
class PairStep:
    """A pair with gradients in one step."""

    pair: LoraPair
    A: Entry
    B: Entry


def stacks(steps: Iterable[PairStep]) -> Iterator[list[PairStep]]:
    """Pairs that can be adjusted together: same shapes, scaling, dtype and device.

    Their factors and gradients are copied into stacks, so not too many at a time.
    """

    def kind(step: PairStep) -> tuple[tuple[Any, ...], torch.device]:
        pair, A = step.pair, step.pair.A
        return (pair.shape, pair.scaling, A.dtype, step.A.grad.dtype), A.device

    def size(step: PairStep) -> int:
        return step.pair.A.numel() + step.pair.B.numel()

    for _, stack in batches(steps, kind, size):
        yield stack
