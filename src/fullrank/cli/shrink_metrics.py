"""What `fullrank shrink` measures on language models and classifiers, and a user's own metric."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank.core.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from fullrank.training.lm_data import Blocks

_POSITIONS = "position_embeddings"
_UNKNOWN_LENGTH = 10**9

Metric = Callable[[Any], Any]


@dataclass(frozen=True)
class LanguageMetric:
    """How well a causal language model predicts sequences of tokens.

    Attributes
    ----------
    blocks
        Sequences; every token but the first of each is predicted.
    bytes_per_token
        Of the text they come from.
    perplexity
        One number, ``exp`` of the mean over tokens; else bits per byte, one value a sequence.
    batch_size
        Sequences at a time.
    """

    blocks: Blocks
    bytes_per_token: float
    perplexity: bool = False
    batch_size: int = 8

    def __call__(self, model: Any) -> npt.NDArray[np.float64] | float:
        """Measure a model. The mean of the values is the text's bits per byte."""
        import numpy as np

        nats, counts = self._nats(model)
        if self.perplexity:
            return float(np.exp(nats.sum() / counts.sum()))
        # Divided by the mean length, not by each one's: the mean is then that of the whole text.
        found: npt.NDArray[np.float64] = nats / math.log(2) / (counts.mean() * self.bytes_per_token)
        return found

    def _nats(self, model: Any) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        import numpy as np
        import torch

        from fullrank.core.batches import device_of
        from fullrank.core.modes import evaluating

        nats: list[float] = []
        counts: list[int] = []
        rows = [block["input_ids"] for block in self.blocks]
        with evaluating(model), torch.no_grad():
            for batch in _alike(rows, self.batch_size):
                ids = torch.stack(batch).to(device_of(model))
                logits = model(input_ids=ids).logits[:, :-1].float()
                loss = torch.nn.functional.cross_entropy(
                    logits.transpose(1, 2), ids[:, 1:], reduction="none"
                )
                nats += loss.double().sum(1).tolist()
                counts += [ids.shape[1] - 1] * len(ids)
        return np.asarray(nats), np.asarray(counts, dtype=np.float64)


def _alike(rows: Sequence[Any], size: int) -> list[list[Any]]:
    """Batches of rows in order; a shorter one at the end stands alone."""
    whole = [row for row in rows if len(row) == len(rows[0])]
    batches = [whole[i : i + size] for i in range(0, len(whole), size)]
    return batches + [[row] for row in rows[len(whole) :]]


@dataclass(frozen=True)
class Accuracy:
    """Whether a classifier gives each text its label.

    Attributes
    ----------
    rows
        (text, number of its label).
    max_length
        Tokens that texts are cut to, if fewer than the model takes.
    """

    rows: Sequence[tuple[str, int]]
    tokenizer: Any
    max_length: int | None = None
    batch_size: int = 32

    def __call__(self, model: Any) -> list[float]:
        """1 or 0 for each text."""
        import torch

        from fullrank.compress.batches import tokenise
        from fullrank.core.batches import call, device_of, moved
        from fullrank.core.modes import evaluating

        longest = longest_input(model, self.tokenizer, self.max_length)
        hits: list[float] = []
        with evaluating(model), torch.no_grad():
            for start in range(0, len(self.rows), self.batch_size):
                rows = self.rows[start : start + self.batch_size]
                batch = tokenise(model, [text for text, _ in rows], longest, self.tokenizer)
                found = call(model, moved(batch, device_of(model))).logits.argmax(-1).tolist()
                hits += [float(a == b) for a, (_, b) in zip(found, rows, strict=True)]
        return hits


def longest_input(model: Any, tokenizer: Any, wanted: int | None = None) -> int | None:
    """Return how many tokens to cut texts to: what is wanted, but no more than the model takes."""
    limits = [] if wanted is None else [wanted]
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None:
        # Where the padding has a position (RoBERTa), the text's are counted from after it.
        table = next((m for n, m in model.named_modules() if n.endswith(_POSITIONS)), None)
        padding = getattr(table, "padding_idx", None)
        limits.append(positions if padding is None else positions - padding - 1)
    # Tokenizers that do not know a limit say a number beyond all.
    if tokenizer.model_max_length < _UNKNOWN_LENGTH:
        limits.append(tokenizer.model_max_length)
    return min(limits, default=None)


def own_metric(name: str, tokenizer: Any = None) -> Metric:
    """Find a user's function, ``module:function``, in the working folder or what is installed.

    It is called with a model (and the tokenizer, if it has a parameter of that name), and returns
    one number a sample, in the same order every time, or a single number.

    Raises
    ------
    InputError
        When there is no such module or function, or it takes something else.

    Examples
    --------
    >>> own_metric("math:nothing")
    Traceback (most recent call last):
        ...
    fullrank.core.errors.InputError: --metric math:nothing: module math has no 'nothing'
    """
    module_name, _, function = name.partition(":")
    if not module_name or not function:
        raise InputError(f"--metric {name!r}; write it as module:function")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"--metric {name}: {error}") from error
    found = getattr(module, function, None)
    if found is None:
        raise InputError(f"--metric {name}: module {module_name} has no {function!r}")
    if not callable(found):
        raise InputError(f"--metric {name} is a {type(found).__name__}, not a function")
    parameters = inspect.signature(found).parameters
    needed = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    others = [n for n in needed[1:] if n != "tokenizer"]
    if others:
        raise InputError(
            f"--metric {name} wants {', '.join(others)}; it is called with the model, and "
            "tokenizer= if it takes one"
        )
    if "tokenizer" in parameters:
        return lambda model: found(model, tokenizer=tokenizer)
    metric: Metric = found
    return metric
