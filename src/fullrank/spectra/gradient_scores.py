"""What quality by gradients is compared with: perplexity, instruction-following difficulty."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from fullrank.core.batches import device_of
from fullrank.core.modes import evaluating
from fullrank.core.progress import progress as progress_bar
from fullrank.spectra.gradient_examples import Example, Tokens, examples_of, padded, tokens_of
from fullrank.spectra.gradient_spectrum import mean_loss

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ReferenceScore:
    """How well a model expects a response.

    Attributes
    ----------
    perplexity
        Of the response, given the prompt.
    alone
        Of the response without it.
    """

    perplexity: float
    alone: float

    @property
    def ifd(self) -> float:
        """Instruction-following difficulty (arXiv 2308.12032): how little the prompt helps.

        The ratio of both perplexities: 1 where it does not help, above where it misleads.
        """
        return self.perplexity / self.alone


@torch.no_grad()
def reference_scores(
    model: nn.Module,
    tokenizer: Any,
    examples: Iterable[Mapping[str, Any] | Example],
    *,
    max_length: int = 4096,
    template: Literal["chat"] | None = None,
    progress: bool = True,
) -> dict[str, ReferenceScore]:
    """Perplexity of each response with and without its prompt; their ratio is IFD.

    Parameters
    ----------
    model, tokenizer
        A causal language model; run in evaluation mode, then left as it was.
    examples, max_length, template
        As for :class:`~fullrank.spectra.GradientQuality`.
    progress
        Show a bar.

    Returns
    -------
    dict
        Id -> score; examples without a scored token are left out.
    """
    found: dict[str, ReferenceScore] = {}
    wanted = examples_of(examples)
    bar = progress_bar("perplexity", len(wanted), progress, "examples")
    with bar as advance, evaluating(model):
        for example in wanted:
            advance(1)
            tokens = tokens_of(tokenizer, example, max_length=max_length, template=template)
            # The first token of a response by itself has nothing before it and is not scored.
            if isinstance(tokens, str) or len(tokens.ids) - tokens.start < 2:
                continue
            alone = Tokens(tokens.ids[tokens.start :], 1)
            after, before = (_perplexity(model, part) for part in (tokens, alone))
            found[example.id] = ReferenceScore(after, before)
    return found


def with_ifd(
    model: nn.Module,
    tokenizer: Any,
    examples: Iterable[Mapping[str, Any] | Example],
    **options: Any,
) -> list[Example]:
    """Give examples their IFD beside the scores they came with; see :func:`reference_scores`."""
    wanted = examples_of(examples)
    found = reference_scores(model, tokenizer, wanted, **options)
    given = {id_: {"IFD": score.ifd} for id_, score in found.items()}
    return [replace(e, given={**e.given, **given.get(e.id, {})}) for e in wanted]


def _perplexity(model: nn.Module, tokens: Tokens) -> float:
    ids, labels, _ = (tensor.to(device_of(model)) for tensor in padded([tokens], 0))
    loss = float(mean_loss(model(input_ids=ids, use_cache=False).logits, labels))
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
