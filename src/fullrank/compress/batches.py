"""Calibration data in any of its forms, and how a model is run on it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fullrank.core.batches import Batch, device_of, is_sentence_transformer, moved
from fullrank.core.errors import InputError


class Batches:
    """Batches of model inputs, made from texts or passed through.

    Parameters
    ----------
    model
        Says which device the batches go to; a SentenceTransformer also tokenises texts.
    data
        An iterable of texts (a list, a column of a table, ...), or of batches: tensors, tuples of
        tensors, or mappings such as a tokenizer gives (whose ``attention_mask`` is then
        respected).
    batch_size
        Texts a batch.
    max_length
        Texts are cut to so many tokens; None keeps the model's own limit.
    tokenizer
        Needed when texts are given and the model is no SentenceTransformer.

    Raises
    ------
    InputError
        When there is no data, or texts without a tokenizer.

    Examples
    --------
    >>> [tuple(b.shape) for b in Batches(nn.Linear(3, 2), [torch.zeros(4, 3)] * 2)]
    [(4, 3), (4, 3)]
    """

    # How texts are tokenised: the batch size, the length they are cut to, the tokenizer.
    _how: tuple[int, int | None, Callable[..., Any] | None]

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        *,
        batch_size: int = 32,
        max_length: int | None = None,
        tokenizer: Callable[..., Any] | None = None,
    ) -> None:
        if batch_size < 1 or (max_length is not None and max_length < 1):
            raise InputError(f"batch_size={batch_size}, max_length={max_length}: both at least 1")
        how = (batch_size, max_length, tokenizer)
        if isinstance(data, Batches):
            how = data._how
            data = data._data
        if isinstance(data, (str, Tensor, Mapping)):
            raise InputError(
                f"the data is a single {type(data).__name__}; give a list of texts or of batches"
            )
        self._model, self._how = model, how
        self._data: Iterable[Any] = data
        if isinstance(data, Sequence):
            if len(data) == 0:
                raise InputError("the calibration data is empty; give at least a few dozen samples")
            if isinstance(data[0], str):
                self._data = _tokenised(model, data, *how)

    @property
    def total(self) -> int | None:
        """Number of batches, where that is known."""
        return len(self._data) if isinstance(self._data, Sequence) else None

    def __iter__(self) -> Iterator[Batch]:
        items = iter(self._data)
        # Of what is no sequence (a generator, a column of a table) only the first item tells.
        first = next(items, None)
        if isinstance(first, str):
            self._data = _tokenised(self._model, [first, *items], *self._how)
            first, items = None, iter(self._data)
        found = items if first is None else itertools.chain([first], items)
        device = device_of(self._model)
        return (moved(batch, device) for batch in found)


def _tokenised(
    model: nn.Module,
    texts: Sequence[str],
    batch_size: int,
    max_length: int | None,
    tokenizer: Callable[..., Any] | None,
) -> list[dict[str, Tensor]]:
    # Texts of one length side by side: less padding to compute and to leave out.
    ordered = sorted(texts, key=len)
    groups = [list(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]
    return [dict(tokenise(model, group, max_length, tokenizer)) for group in groups]


def tokenise(
    model: nn.Module,
    texts: list[str],
    max_length: int | None = None,
    tokenizer: Callable[..., Any] | None = None,
) -> Mapping[str, Tensor]:
    """Turn texts into one batch for this model."""
    if is_sentence_transformer(model):
        encoder: Any = model
        options = {}
        if max_length is not None:
            # For this call only: the model keeps its own limit.
            cut = {"max_length": min(max_length, encoder.max_seq_length or max_length)}
            options = {"processing_kwargs": {"text": {**cut, "truncation": True}}}
        features = encoder.preprocess(texts, **options)
        return {k: v for k, v in features.items() if isinstance(v, Tensor)}
    if tokenizer is None:
        raise InputError("texts were given without a tokenizer; pass tokenizer=, or batches")
    cut = {"max_length": max_length} if max_length is not None else {}
    batch: Mapping[str, Tensor] = tokenizer(
        texts, padding=True, truncation=True, return_tensors="pt", **cut
    )
    return batch


def attention_mask(batch: Batch, prefix: Literal["", "decoder_"] = "") -> Tensor | None:
    """Return the ``(batch, length)`` attention mask of a batch that has one."""
    mask = batch.get(f"{prefix}attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def both_masks(batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """Return the mask of what an encoder (or a model in one part) reads, and a decoder's."""
    return attention_mask(batch), attention_mask(batch, "decoder_")


def unambiguous_first(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Put a batch of as many sequences as tokens a sequence after one that is not, if there is one.

    :class:`TokenLayout` tells from that one which of a layer's dimensions is which.
    """
    held: list[Batch] | None = []
    for batch in batches:
        masks = [mask for mask in both_masks(batch) if mask is not None]
        if held is not None and any(_is_square(mask) for mask in masks):
            held.append(batch)
            continue
        yield batch
        if held is not None and masks:
            yield from held
            held = None
    yield from held or ()


class TokenLayout:
    """How each layer sees the tokens of a batch, as far as what it saw so far tells.

    Examples
    --------
    >>> layout, mask = TokenLayout(), torch.ones(2, 5)
    >>> [layout.by_token("fc", x, mask)[0].shape for x in (torch.ones(10, 3), torch.ones(5, 2, 3))]
    [torch.Size([2, 5, 3]), torch.Size([2, 5, 3])]
    """

    def __init__(self) -> None:
        self._length_first: set[str] = set()

    def by_token(
        self, name: str, value: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what a layer saw in the mask's order, and the mask.

        Parameters
        ----------
        name
            Of the layer.
        value
            ``(..., d)``; one that is not of one vector a token comes back as it is, with no mask.
        mask
            ``(batch, length)``, if there is one.
        """
        places = value.shape[:-1]
        if mask is None or places.numel() != mask.numel():
            return value, None
        if places == mask.shape[::-1] and not _is_square(mask):
            self._length_first.add(name)
        if len(places) == 2 and name in self._length_first:
            return value.transpose(0, 1), mask
        return value.reshape(*mask.shape, value.shape[-1]), mask


def _is_square(mask: Tensor) -> bool:
    return mask.shape[0] == mask.shape[1] > 1


class Output(NamedTuple):
    """What a model is used for, one row a sample or token, and whether rows are logits."""

    value: Tensor
    logits: bool = False


def output_of(
    result: Any, mask: Tensor | None = None, decoder_mask: Tensor | None = None
) -> Output:
    """Find in what a model returned the part it is used for.

    Unit sentence embeddings, logits, or the mean of the last hidden state over real tokens (of the
    decoder, behind an encoder); for a plain module its output tensor.
    """
    if isinstance(result, Tensor):
        return Output(result)
    if isinstance(result, tuple):
        return output_of(result[0], mask, decoder_mask)

    def get(key: str) -> Any:
        return result.get(key) if isinstance(result, Mapping) else getattr(result, key, None)

    if get("encoder_last_hidden_state") is not None:
        mask = decoder_mask
    if (embedding := get("sentence_embedding")) is not None:
        return Output(functional.normalize(embedding, dim=-1))
    if (logits := get("logits")) is not None:
        by_token = mask is not None and logits.ndim == 3 and logits.shape[:2] == mask.shape
        return Output(logits[mask.bool()] if by_token and mask is not None else logits, True)
    hidden = get("last_hidden_state")
    if hidden is None:
        raise InputError(f"cannot tell which part of a {type(result).__name__} is the output")
    if mask is None:
        return Output(hidden.mean(1))
    weights = mask.to(hidden)[..., None]
    return Output((hidden * weights).sum(1) / weights.sum(1).clamp_min(1))


def probe(output: Output, generator: torch.Generator) -> Tensor:
    """Return a number whose gradients' second moment says how the model reacts to errors.

    Outputs are projected on a random direction a row, which gives the Gauss-Newton matrix of
    their squared error; of logits, a label is drawn from the model's own distribution, which
    gives the Fisher information.
    """
    value = output.value
    if output.logits:
        rows = value.reshape(-1, value.shape[-1]).float()
        drawn = torch.multinomial(rows.detach().softmax(-1).cpu(), 1, generator=generator)
        return nn.functional.cross_entropy(rows, drawn[:, 0].to(rows.device), reduction="sum")
    direction = torch.randn(value.shape, generator=generator).to(value)
    return (value * direction).sum()
