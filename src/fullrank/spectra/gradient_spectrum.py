"""`gradient_spectrum`: how strongly, and in how many directions, examples push a layer's weights.

Singular values of the gradients of attention projections, one backward pass for a batch (Li et
al., "Instruction and reasoning data through layer-wise gradients", arXiv 2504.10766).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from fullrank.core.batches import device_of
from fullrank.core.errors import InputError
from fullrank.core.modes import evaluating
from fullrank.spectra.fused_projections import parts_of
from fullrank.spectra.gradient_hooks import (
    Consume,
    Factor,
    Method,
    Modules,
    caught,
    chosen_layers,
)
from fullrank.spectra.parallel import each
from fullrank.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import nn

_IGNORED = -100
# Rows from which a thread for each matrix pays on the CPU.
_LONG = 128


@dataclass(frozen=True)
class ExampleGradient:
    """What one example would change.

    Attributes
    ----------
    loss
        Mean cross-entropy of its scored tokens, nats.
    tokens
        How many are scored.
    spectra
        Layer (or its query, key, value part) -> spectrum of the gradient of the loss.
    """

    loss: float
    tokens: int
    spectra: Mapping[str, Spectrum]


def gradient_spectrum(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    modules: Modules = "attention",
    method: Method = "auto",
    *,
    attention_mask: Tensor | None = None,
) -> dict[str, Spectrum]:
    """Spectra of the gradient of the mean loss over all scored tokens of a batch.

    A weight that several linear layers use, or one layer several times, has one gradient, that of
    all its uses (but not of its use as an embedding).

    Parameters
    ----------
    model
        A causal language model; run in evaluation mode, then left as it was, with all its flags
        and gradients. Weights may be frozen or quantised, and adapters beside them.
    input_ids, labels
        Tensors or arrays ``(T,)`` or ``(B, T)``; labels of -100 are not scored (they are shifted
        here, as in transformers).
    modules
        ``"attention"`` (its projections, the paper's choice), a regular expression that is
        searched in names, or a function of name and module. Fused query, key and value count
        apart.
    method
        ``"factored"``: from inputs and output gradients, exact, without the weight gradient;
        ``"grad"``: from their product, the weight gradient; ``"auto"``: what is smaller.
    attention_mask
        ``(B, T)``, 0 for padding.

    Returns
    -------
    dict
        Canonical name of the layer -> spectrum.

    Raises
    ------
    InputError
        When no layer matches, no token is scored, or a loss or gradient is not finite.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM  # doctest: +SKIP
    >>> found = gradient_spectrum(model, ids, labels)  # doctest: +SKIP
    >>> found["model.layers.0.self_attn.q_proj"].effective_rank  # doctest: +SKIP
    """
    (found,) = _backward(model, input_ids, labels, attention_mask, modules, method, together=True)
    return dict(found.spectra)


def example_gradients(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    modules: Modules = "attention",
    method: Method = "auto",
    *,
    attention_mask: Tensor | None = None,
) -> list[ExampleGradient]:
    """Loss and gradient spectra of every example of a batch by itself, in one backward pass.

    Parameters
    ----------
    model, input_ids, labels, modules, method, attention_mask
        As for :func:`gradient_spectrum`; each example's loss is the mean over its own tokens.

    Raises
    ------
    InputError
        As :func:`gradient_spectrum`; also when one example has no scored token.
    """
    return _backward(model, input_ids, labels, attention_mask, modules, method, together=False)


def _backward(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    modules: Modules,
    method: Method,
    *,
    together: bool,
) -> list[ExampleGradient]:
    if method not in get_args(Method):
        raise InputError(f"method={method!r}; it is one of {', '.join(get_args(Method))}")
    layers = chosen_layers(model, modules)
    sinks = _Sinks(layers, getattr(model, "config", None), method, together)
    losses, counts = backward(model, input_ids, labels, mask, layers, sinks.take, together=together)
    return [
        ExampleGradient(loss, count, found)
        for loss, count, found in zip(losses, counts, sinks.spectra(), strict=True)
    ]


def backward(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    mask: Tensor | None,
    layers: Mapping[str, nn.Module],
    consume: Consume,
    *,
    together: bool,
) -> tuple[list[float], list[int]]:
    """Hand over inputs and output gradients of layers; returns mean losses and scored tokens.

    Parameters
    ----------
    model, input_ids, labels, mask
        As for :func:`gradient_spectrum`.
    layers, consume
        As for :func:`~fullrank.spectra.gradient_hooks.caught`; the last layer comes first.
    together
        One loss, the mean over all scored tokens; else one for each example.
    """
    if torch.is_inference_mode_enabled():
        raise InputError("there are no gradients under torch.inference_mode(): call this outside")
    device = device_of(model)
    ids, wanted = (_rows(t).to(device) for t in (input_ids, labels))
    if ids.shape != wanted.shape:
        raise InputError(f"input_ids {tuple(ids.shape)} and labels {tuple(wanted.shape)} differ")
    scored = (wanted[:, 1:] != _IGNORED).sum(1)
    if not (scored.sum() if together else scored.min()):
        raise InputError("no token is scored: every label is -100 (the first is never scored)")
    with evaluating(model), torch.enable_grad(), caught(model, layers, consume, together=together):
        options = {} if mask is None else {"attention_mask": _rows(mask).to(device)}
        logits = model(input_ids=ids, use_cache=False, **options).logits
        pairs = [(logits, wanted)] if together else zip(logits, wanted, strict=True)
        losses = torch.stack([mean_loss(*pair) for pair in pairs])
        if not losses.isfinite().all():
            raise InputError(f"the loss is {losses.tolist()}: the model's outputs are not finite")
        torch.autograd.backward(losses.sum())
    return losses.tolist(), [int(scored.sum())] if together else scored.tolist()


def _rows(tensor: Tensor) -> Tensor:
    tensor = torch.as_tensor(tensor)
    return tensor[None] if tensor.ndim == 1 else tensor


def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the scored tokens, step by step as transformers computes it.

    In float32 whatever the weights are in: gradients then agree with those of ``model(...).loss``
    to the last digit.
    """
    shifted = F.pad(labels, (0, 1), value=_IGNORED)[..., 1:]
    return F.cross_entropy(logits.flatten(0, -2).float(), shifted.flatten(), ignore_index=_IGNORED)


def _same(one: Tensor, other: Tensor) -> bool:
    return all(get(one) == get(other) for get in (Tensor.data_ptr, Tensor.size, Tensor.stride))


class _Job(NamedTuple):
    """Output gradients ``D`` of an example, and where the singular values go."""

    values: dict[str, Tensor]
    part: str
    factor: Factor
    D: Tensor


class _Sinks:
    """Turns what the hooks catch into singular values at once, and lets it go."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        config: Any,
        method: Method,
        together: bool,
    ) -> None:
        self._parts = {name: parts_of(name, layer, config) for name, layer in layers.items()}
        self._method, self._together = method, together
        self._values: list[dict[str, Tensor]] = []
        # Query, key and value read the same inputs, one after another.
        self._last: tuple[Tensor, list[Factor]] | None = None

    def take(self, name: str, x: Tensor, gradient: Tensor) -> None:
        wide = torch.promote_types(gradient.dtype, torch.float32)
        factors = self._factors(x, wide)
        rows = self._split(gradient.to(wide))
        self._values = self._values or [{} for _ in rows]
        jobs = [
            _Job(values, part, factor, D[:, where])
            for values, factor, D in zip(self._values, factors, rows, strict=True)
            for part, where in self._parts[name].items()
        ]

        def singular_values(job: _Job) -> Tensor:
            return job.factor.values(job.D, self._method)

        threads = x.device.type == "cpu" and len(rows[0]) >= _LONG
        found = each(singular_values, jobs) if threads else ((j, singular_values(j)) for j in jobs)
        for job, values in found:
            job.values[job.part] = values

    def _factors(self, x: Tensor, dtype: torch.dtype) -> list[Factor]:
        if self._last is None or not _same(self._last[0], x):
            self._last = (x, [Factor(X) for X in self._split(x.to(dtype))])
        return self._last[1]

    def _split(self, tensor: Tensor) -> Sequence[Tensor]:
        return [tensor.flatten(0, -2)] if self._together else list(tensor)

    def spectra(self) -> list[dict[str, Spectrum]]:
        """Of each example, in the order of the layers, not of the backward pass."""
        self._last = None
        if not self._values:
            raise InputError("none of the chosen layers took part in the loss")
        found = []
        for values in self._values:
            order = [part for parts in self._parts.values() for part in parts if part in values]
            for part in order:
                if not values[part].isfinite().all():
                    raise InputError(f"the gradient of {part} is not finite")
            found.append({part: Spectrum(values[part].double().cpu()) for part in order})
        return found
