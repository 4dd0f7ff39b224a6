"""`CrossEncoderReranker`: a model that reads query and document together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fullrank.core.corpus import Corpus, Queries
from fullrank.core.errors import InputError, require
from fullrank.core.models import find_model, load_model, quiet_transformers
from fullrank.core.progress import progress as progress_bar
from fullrank.core.run import Run
from fullrank.retrieval.reranker import RerankerStage, with_tail
from fullrank.retrieval.retriever import candidates, check_depth, readable
from fullrank.retrieval.rust_tokenizers import rust_tokenizer

# Batches between two steps of the progress bar.
_STEP = 16
# Texts of fewer characters a token are left to the model's tokenizer.
_CHARACTERS = 16
_WANTED = "a cross-encoder: a folder or a Hugging Face id such as 'org/name'"


class CrossEncoderReranker(RerankerStage):
    """Rerank with a cross-encoder of sentence-transformers.

    Scores are the model's logits, in float32: an activation such as the sigmoid would round good
    documents to the same 1.0. Of a pair that is longer than the model takes, the longer text is
    cut.

    Parameters
    ----------
    model
        A name (see :func:`~fullrank.core.resolve_model`), a folder, or a ``CrossEncoder``, which
        is not changed. It has one output, a query-document pair's score.
    corpus
        Where documents' texts are, when no stage before it knows.
    depth
        How many documents of a query are reranked; what is behind them stays behind them.
    batch_size
        Pairs scored at once; they are sorted by length first.
    max_tokens
        Pairs are cut to so many tokens; the model's own limit by default.
    device
        For a model that is loaded here.
    progress
        Whether to show a bar.

    Raises
    ------
    InputError
        For a model that is not there, is no cross-encoder, or has more than one output.
    """

    name = "cross-encoder"

    def __init__(
        self,
        model: Any,
        *,
        corpus: Corpus | None = None,
        depth: int = 100,
        batch_size: int = 32,
        max_tokens: int | None = None,
        device: str | None = None,
        progress: bool = False,
    ) -> None:
        self.model = _load(model, device)
        if self.model.num_labels != 1:
            raise InputError(
                f"the cross-encoder has {self.model.num_labels} outputs; a reranker has one score"
            )
        self.corpus = corpus
        self.depth = check_depth(depth, "depth")
        self.batch_size = check_depth(batch_size, "batch_size")
        self.max_tokens = _token_limit(self.model, max_tokens)
        self.progress = progress

    def rerank(self, queries: Queries, run: Run, corpus: Corpus | None = None) -> Run:
        """Reorder the first ``depth`` documents of every query."""
        documents = corpus if corpus is not None else self.corpus
        if documents is None:
            raise InputError(
                f"{self.name} needs the documents' texts: pass corpus=, or put it behind a "
                "retriever, whose corpus it then takes"
            )
        texts, listed = candidates(queries, run)
        pairs = [
            (text, documents[identifier].contents)
            for text, query in zip(texts, listed, strict=True)
            for identifier in run[query].ids[: self.depth].tolist()
        ]
        scores = self.score(pairs)
        rankings = {}
        start = 0
        for query in listed:
            stop = start + min(self.depth, len(run[query]))
            rankings[query] = with_tail(run[query], scores[start:stop])
            start = stop
        return Run(rankings, name=self.name)

    def score(self, pairs: Sequence[tuple[str, str]]) -> npt.NDArray[np.float32]:
        """Logits of (query, document) pairs, ``(len(pairs),)``."""
        torch = require("torch", extra="hf")
        scores = np.empty(len(pairs), dtype=np.float32)
        heads = {text: self._head(readable(text)) for pair in pairs for text in pair}
        pairs = [(heads[query], heads[document]) for query, document in pairs]
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        cut = {"text": {"max_length": self.max_tokens, "truncation": True}}
        with progress_bar("rerank", len(pairs), self.progress, unit="pairs") as advance:
            for begin in range(0, len(order), step := self.batch_size * _STEP):
                rows = order[begin : begin + step]
                scores[rows] = self.model.predict(
                    [pairs[row] for row in rows],
                    batch_size=self.batch_size,
                    show_progress_bar=False,
                    activation_fn=torch.nn.Identity(),
                    processing_kwargs=cut,
                )
                advance(len(rows))
        if not np.isfinite(scores).all():
            raise InputError(f"{self.name} gave a score that is not a finite number")
        return scores

    @cached_property
    def _tokenizer(self) -> Any:
        return rust_tokenizer(self.model.tokenizer)

    def _head(self, text: str) -> str:
        """Cut off what can never be seen: tokenizers take quadratic time to shorten a pair."""
        if len(text) <= _CHARACTERS * self.max_tokens:
            return text
        if self._tokenizer is None:
            return text[: _CHARACTERS * self.max_tokens]
        offsets = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return text if len(offsets) <= self.max_tokens else text[: offsets[self.max_tokens - 1][1]]


def _load(model: Any, device: str | None) -> Any:
    library = require("sentence_transformers", extra="hf")
    if isinstance(model, library.CrossEncoder):
        return model
    if not isinstance(model, (str, Path)):
        raise InputError(
            f"the model is a {type(model).__name__}; give a name, a folder or a CrossEncoder"
        )
    find_model(model, wanted=_WANTED)
    _check_head(model)
    return load_model(model, lambda source: library.CrossEncoder(source, device=device))


def _check_head(model: str | Path) -> None:
    """Refuse a checkpoint without a score: it would be given a random one, and rank by chance.

    Only the loading of the network itself says what the file did not have, and the library that
    loads it next does not pass that on. So it is loaded once more before, onto no device: that
    reads names and shapes and no weights.
    """
    transformers = require("transformers", extra="hf")
    config = load_model(model, transformers.AutoConfig.from_pretrained)
    if (config.architectures or [""])[0].endswith("ForCausalLM"):
        return  # scored by the logits of two of its words: nothing is added to it
    auto = transformers.AutoModelForSequenceClassification
    with quiet_transformers(logs=True):  # its report of what is missing is for those who train
        _, found = load_model(
            model,
            lambda s: auto.from_pretrained(s, output_loading_info=True, device_map="meta"),
        )
    if found["missing_keys"]:
        raise InputError(
            f"{str(model)!r} is no cross-encoder: it has no weights for "
            f"{', '.join(sorted(found['missing_keys']))}. An encoder or a bare language model "
            f"does not score pairs; give {_WANTED}"
        )


def _token_limit(model: Any, wanted: int | None) -> int:
    """Return the most tokens of a pair: of what was asked for, the tokenizer and the model."""
    own = getattr(model, "max_seq_length", None)
    config = getattr(model.model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if wanted is not None and (wanted < 5 or (most is not None and wanted > most)):
        raise InputError(f"max_tokens is {wanted}; this model takes 5 to {most or 'any number'}")
    return int(wanted or min(own or most or 512, most or own or 512))
