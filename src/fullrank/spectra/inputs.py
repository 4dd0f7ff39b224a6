"""Spectra of what flows into a model's layers, in constant memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from fullrank.core.errors import InputError
from fullrank.core.names import named_linears
from fullrank.spectra.activations import activation_spectra
from fullrank.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from torch import nn

TOKENS = 256  # of a text, at most
_PASSAGE = 1000  # characters; longer texts are cut, so that a book is many samples


def input_spectra(model: nn.Module, batches: Iterable[Any]) -> dict[str, Spectrum]:
    """Spectra of the inputs of every linear layer over batches, neither centred nor scaled.

    See :func:`~fullrank.spectra.activation_spectra`; padding never counts.

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
        When there is no linear layer, none ran, or values that count are not finite.

    Examples
    --------
    >>> import torch
    >>> layer = torch.nn.Linear(4, 2)
    >>> found = input_spectra(torch.nn.Sequential(layer), [torch.eye(4), torch.eye(4)])
    >>> round(found["0"].effective_rank, 6)
    4.0
    """
    return activation_spectra(model, batches, dict(named_linears(model)), side="input")


def token_batches(
    tokenizer: Any, texts: Sequence[str], samples: int, *, limit: int = TOKENS, size: int = 16
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
