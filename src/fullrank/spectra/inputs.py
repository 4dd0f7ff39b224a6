"""Spectra of what flows into a model's layers, in constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fullrank.core.batches import call, device_of, moved
from fullrank.core.capture import capture
from fullrank.core.errors import InputError
from fullrank.core.modes import evaluating
from fullrank.core.moments import Moments
from fullrank.core.names import named_linears
from fullrank.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import nn

_TOKENS = 256  # of a text, at most
_PASSAGE = 1000  # characters; longer texts are cut, so that a book is many samples


@torch.no_grad()
def input_spectra(model: nn.Module, batches: Iterable[Any]) -> dict[str, Spectrum]:
    """Spectra of the inputs of every linear layer over batches, neither centred nor scaled.

    Keeps one ``(n, n)`` second moment in float64 for each layer of input width n, however many
    samples there are; singular values below 1e-8 of the largest are lost. Padding never counts
    where a batch is a mapping with an ``attention_mask``.

    Parameters
    ----------
    model
        Run in evaluation mode, then left as it was.
    batches
        Tensors, tuples of tensors, or mappings such as a tokenizer gives.

    Returns
    -------
    dict
        Canonical name -> spectrum, for the layers that ran.

    Raises
    ------
    InputError
        When no linear layer ran, or values are not finite.

    Examples
    --------
    >>> layer = torch.nn.Linear(4, 2)
    >>> found = input_spectra(torch.nn.Sequential(layer), [torch.eye(4), torch.eye(4)])
    >>> round(found["0"].effective_rank, 6)
    4.0
    """
    modules = dict(named_linears(model))
    moments: dict[str, Moments] = {}
    mask: list[Tensor | None] = [None]

    def consume(name: str, x: Tensor) -> None:
        if name not in moments:
            moments[name] = Moments(x.shape[-1], x.device)
        kept = mask[0]
        fits = kept is not None and x.shape[:-1] == kept.shape
        moments[name].update(x, kept if fits else None)

    device = device_of(model)
    with evaluating(model), capture(modules, consume):
        for batch in batches:
            found = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask[0] = None if found is None else found.bool().to(device)
            call(model, moved(batch, device))
    spectra = {name: _spectrum(m) for name, m in moments.items() if m.count}
    if not spectra:
        raise InputError("no linear layer ran on the data: give at least one batch of inputs")
    return {name: spectra[name] for name in modules if name in spectra}


def token_batches(
    tokenizer: Any, texts: Sequence[str], samples: int, *, limit: int = _TOKENS, size: int = 16
) -> list[Any]:
    """Tokenise the first ``samples`` passages of texts, ``size`` a batch, for a model to run on.

    Raises
    ------
    InputError
        When there is no text.
    """
    passages = [
        text[start : start + _PASSAGE]
        for text in texts
        for start in range(0, len(text), _PASSAGE)
        if text[start : start + _PASSAGE].strip()
    ][:samples]
    if not passages:
        raise InputError("there is no text in the data")
    if tokenizer.pad_token is None:
        # Language models often have none; masked positions may hold any token.
        tokenizer.pad_token = tokenizer.eos_token
    passages.sort(key=len)  # little padding
    longest = min(limit, tokenizer.model_max_length)
    return [
        tokenizer(
            passages[i : i + size],
            padding=True,
            truncation=True,
            max_length=longest,
            return_tensors="pt",
        )
        for i in range(0, len(passages), size)
    ]


def _spectrum(moments: Moments) -> Spectrum:
    values = torch.linalg.eigvalsh(moments.second_moment).clamp_min(0).sqrt().flip(0)
    # Of N rows no more than N singular values; the moment's others are rounding.
    values = values.clone()
    values[moments.count :] = 0.0
    return Spectrum(values.cpu() * moments.count**0.5)
