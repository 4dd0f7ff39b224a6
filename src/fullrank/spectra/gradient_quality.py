"""`GradientQuality`: instruction data judged by what its examples would change in a model.

Examples of higher quality push less hard (nuclear norm) and in more directions (effective rank),
says the paper. But a mean over more tokens pushes less hard anyway, and n tokens push in at most
n directions: comparisons are of responses of one length unless that is turned off.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fullrank.core.errors import InputError
from fullrank.core.names import model_fingerprint
from fullrank.core.progress import progress as progress_bar
from fullrank.core.table import Cell, Table
from fullrank.spectra.gradient_comparison import Comparison
from fullrank.spectra.gradient_examples import Example, Tokens, examples_of, padded, tokens_of
from fullrank.spectra.gradient_hooks import Method, Modules, chosen_layers
from fullrank.spectra.gradient_score_file import ScoreFile
from fullrank.spectra.gradient_spectrum import example_gradients

if TYPE_CHECKING:
    from torch import nn

By = Literal["erank", "nuclear", "loss"]
LENGTH = 64
"""Tokens of the response that comparisons look at by default."""


@dataclass(frozen=True)
class Scored:
    """What one example would change.

    Attributes
    ----------
    id
        The example's.
    loss, tokens
        Mean cross-entropy of the scored tokens, nats, and how many they are.
    nuclear, erank
        Layer -> nuclear norm and effective rank of its gradient.
    given
        Scores that came with the example.
    """

    id: str
    loss: float
    tokens: int
    nuclear: Mapping[str, float]
    erank: Mapping[str, float]
    given: Mapping[str, float]

    @property
    def n_tokens(self) -> int:
        """The same as :attr:`tokens`."""
        return self.tokens

    def mean(self, what: By) -> float:
        """Mean over the layers; the loss itself."""
        if what == "loss":
            return self.loss
        return float(np.mean(list(getattr(self, what).values())))


@dataclass(frozen=True)
class Scores:
    """Scores of a data set: a row for every example and layer, in named columns.

    ``len(scores)``, ``scores.columns`` and ``scores["erank"]`` are those of :meth:`frame`, without
    pandas.

    Attributes
    ----------
    rows
        Of the examples that could be scored, in the data's order.
    skipped
        Id -> why an example was left out.
    """

    rows: Sequence[Scored]
    skipped: Mapping[str, str]

    def table(self) -> Table:
        """One row an example; measures are means over the layers."""
        given = list(dict.fromkeys(name for row in self.rows for name in row.given))
        return Table(
            ["id", "loss", "tokens", "nuclear norm", "effective rank", *given],
            [
                (
                    *(r.id, r.loss, r.tokens, r.mean("nuclear"), r.mean("erank")),
                    *(r.given.get(name) for name in given),
                )
                for r in self.rows
            ],
            title=f"{len(self.rows)} examples, {len(self.skipped)} left out",
            formats={"loss": ".3f", "effective rank": ".2f"},
        )

    def correlations(self) -> Table:
        """Spearman's rank correlation of both measures with each score that came with the data."""
        given = list(dict.fromkeys(name for row in self.rows for name in row.given))
        rows: list[list[Cell]] = []
        for name in ["tokens", "loss", *given]:
            having = [r for r in self.rows if name in r.given or name not in given]
            values = [float(r.given[name] if name in given else getattr(r, name)) for r in having]
            row: list[Cell] = [name, len(having)]
            for what in ("nuclear", "erank"):
                row.append(_spearman(values, [r.mean(what) for r in having]))
            rows.append(row)
        columns = ["score", "examples", "with nuclear norm", "with effective rank"]
        formats = dict.fromkeys(columns[2:], "+.2f")
        return Table(columns, rows, title="Rank correlations", formats=formats)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return ["id", "loss", "n_tokens", "layer", "proj", "nuclear", "erank"]

    def __len__(self) -> int:
        return sum(len(row.erank) for row in self.rows)

    def __getitem__(self, column: str) -> list[Cell]:
        if column not in self.columns:
            raise KeyError(f"no column {column!r}; there are {', '.join(self.columns)}")
        place = self.columns.index(column)
        return [record[place] for record in self._records()]

    def frame(self) -> Any:
        """Return a pandas data frame."""
        return Table(self.columns, self._records()).frame()

    def _records(self) -> list[list[Cell]]:
        return [
            [r.id, r.loss, r.tokens, layer, layer.rpartition(".")[2], r.nuclear[layer], rank]
            for r in self.rows
            for layer, rank in r.erank.items()
        ]


class GradientQuality:
    """Scores, compares and sorts instruction data by the gradients of a model.

    Parameters
    ----------
    model, tokenizer
        A causal language model and its tokenizer. In float32 for faithful small singular values;
        float16 lets small gradients vanish and is refused.
    max_length
        Tokens of prompt and response, 4096 (the official code).
    modules
        As for :func:`~fullrank.spectra.gradient_spectrum`.
    length_match
        Tokens of each response that are scored; None for all.
    template
        ``"chat"`` for the tokenizer's chat template; None for plain text.
    method
        As for :func:`~fullrank.spectra.gradient_spectrum`.
    batch_tokens
        Tokens of a batch, padding included. Each example has its gradient by itself in any batch.

    Raises
    ------
    InputError
        On a model in float16, or settings out of range.

    Examples
    --------
    >>> quality = GradientQuality(model, tokenizer)  # doctest: +SKIP
    >>> print(quality.compare(good, bad).table())  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        max_length: int = 4096,
        modules: Modules = "attention",
        length_match: int | None = None,
        template: Literal["chat"] | None = None,
        *,
        method: Method = "auto",
        batch_tokens: int = 2048,
    ) -> None:
        import torch

        if any(p.dtype == torch.float16 for p in model.parameters()):
            raise InputError(
                "the model is in float16, in which small gradients become 0; load it in float32 "
                "or bfloat16"
            )
        for name, value in (("max_length", max_length), ("batch_tokens", batch_tokens)):
            if value < 2:
                raise InputError(f"{name}={value}; at least 2 tokens are needed")
        if length_match is not None and length_match < 1:
            raise InputError(f"length_match={length_match}; at least one token is scored")
        if template not in (None, "chat"):
            raise InputError(f"template={template!r}; it is 'chat', or None for plain text")
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        self.model, self.tokenizer = model, tokenizer
        self.max_length = min(max_length, limit or max_length)
        self.modules, self.method, self.template = modules, method, template
        self.length_match, self.batch_tokens = length_match, batch_tokens

    def score(
        self,
        examples: Iterable[Mapping[str, Any] | Example],
        *,
        out: str | Path | None = None,
        progress: bool = True,
    ) -> Scores:
        """Score every example by itself.

        Parameters
        ----------
        examples
            :class:`~fullrank.spectra.gradient_examples.Example` or rows of fields, as
            :func:`~fullrank.spectra.gradient_examples.read_examples` takes them.
        out
            JSON lines that scores are appended to as they come; the same call goes on where it
            was interrupted, and ends with the same file.
        progress
            Show a bar.

        Raises
        ------
        InputError
            On rows without the fields, a file of other settings or data, a gradient that is not
            finite.
        """
        return self._score(examples_of(examples), self.length_match, out, progress)

    def compare(
        self,
        a: Iterable[Mapping[str, Any] | Example],
        b: Iterable[Mapping[str, Any] | Example],
        length_match: int | None = LENGTH,
        *,
        names: tuple[str, str] = ("a", "b"),
        progress: bool = True,
    ) -> Comparison:
        """Compare two data sets, layer by layer, with standard errors.

        Parameters
        ----------
        a, b
            The data sets.
        length_match
            Score exactly so many tokens of each response, 64 by default; shorter ones are left
            out. None compares whole responses: then length alone moves both measures.
        names
            Shown in tables.
        progress
            Show a bar.

        Raises
        ------
        InputError
            As :meth:`score`, and when fewer than two examples of a set are left.
        """
        sets = [examples_of(data, name) for data, name in zip((a, b), names, strict=True)]
        found = [self._score(data, length_match, None, progress) for data in sets]
        return Comparison(names, (found[0], found[1]), length_match)

    def rank(
        self,
        examples: Iterable[Mapping[str, Any] | Example],
        by: By = "erank",
        *,
        progress: bool = True,
    ) -> list[str]:
        """Ids of the examples, best first: most directions, or the smallest norm or loss."""
        if by not in ("erank", "nuclear", "loss"):
            raise InputError(f"by={by!r}; it is 'erank', 'nuclear' or 'loss'")
        rows = self.score(examples, progress=progress).rows
        return [r.id for r in sorted(rows, key=lambda r: r.mean(by), reverse=by == "erank")]

    # -- scoring -----------------------------------------------------------------------------

    def _score(
        self, examples: list[Example], length: int | None, out: str | Path | None, show: bool
    ) -> Scores:
        tokens: dict[str, Tokens] = {}
        skipped: dict[str, str] = {}
        for example in examples:
            found = tokens_of(
                self.tokenizer,
                example,
                max_length=self.max_length,
                response_tokens=length,
                template=self.template,
            )
            if isinstance(found, str):
                skipped[example.id] = found
            else:
                tokens[example.id] = found
        given = {example.id: example.given for example in examples}
        batches = list(self._batches(tokens))
        identity = self._identity(tokens, length)
        file = None if out is None else ScoreFile(Path(out), identity, batches)
        done = {} if file is None else file.rows
        with progress_bar("score", len(tokens), show, "examples") as advance:
            for batch in batches:
                if batch[0] not in done:
                    scored = self._one_batch(batch, tokens)
                    done.update(scored)
                    if file is not None:
                        file.append(scored)
                advance(len(batch))
        rows, failed = [], {}
        for id_ in tokens:
            values = done[id_]
            if "skipped" in values:
                failed[id_] = values["skipped"]
            else:
                rows.append(Scored(id_, **values, given=given[id_]))
        return Scores(rows, skipped | failed)

    def _batches(self, tokens: Mapping[str, Tokens]) -> Iterator[list[str]]:
        """Ids of examples of about one length, as many as fit."""
        batch: list[str] = []
        for id_ in sorted(tokens, key=lambda i: -len(tokens[i].ids)):
            longest = len(tokens[batch[0]].ids) if batch else 0
            if batch and longest * (len(batch) + 1) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(id_)
        if batch:
            yield batch

    def _one_batch(self, batch: list[str], tokens: Mapping[str, Tokens]) -> dict[str, Any]:
        pad = self.tokenizer.pad_token_id or 0
        ids, labels, mask = padded([tokens[id_] for id_ in batch], pad)
        try:
            found = example_gradients(
                self.model, ids, labels, self.modules, self.method, attention_mask=mask
            )
        except InputError as error:
            if "not finite" not in str(error):
                raise
            if len(batch) == 1:
                return {batch[0]: {"skipped": str(error)}}
            # Which one is it?
            return {k: v for id_ in batch for k, v in self._one_batch([id_], tokens).items()}
        return {id_: _values(gradient) for id_, gradient in zip(batch, found, strict=True)}

    def _identity(self, tokens: Mapping[str, Tokens], length: int | None) -> dict[str, Any]:
        read = [[id_, t.ids, t.start] for id_, t in tokens.items()]
        digest = hashlib.sha256(json.dumps(read).encode())
        weights = hashlib.sha256()
        for parameter in self.model.parameters():
            weights.update(str(float(parameter.detach().double().sum())).encode())
        return {
            "model": model_fingerprint(self.model),
            "weights": weights.hexdigest()[:16],
            "data": digest.hexdigest()[:16],
            "modules": self.modules
            if isinstance(self.modules, str)
            else list(chosen_layers(self.model, self.modules)),
            "length_match": length,
            "batch_tokens": self.batch_tokens,
        }


def _spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, ties at their mean rank; None where one side has one value only."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Sequence[float]) -> Any:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def _values(gradient: Any) -> dict[str, Any]:
    ranks = {name: s.effective_rank for name, s in gradient.spectra.items()}
    if not any(ranks.values()):
        return {"skipped": "the gradient is zero"}
    return {
        "loss": gradient.loss,
        "tokens": gradient.tokens,
        "nuclear": {name: s.nuclear_norm for name, s in gradient.spectra.items()},
        "erank": ranks,
    }
