"""Texts as sequences of tokens, and how well a model predicts them."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fullrank.core.errors import InputError, require
from fullrank.core.models import LANGUAGE_MODEL, load_model
from fullrank.core.modes import evaluating
from fullrank.datasets.texts import Texts
from fullrank.training.processes import Processes

END = "<|end|>"
BYTES = "bytes"
# Of language models and of classifiers.
_TOKENIZED = "a folder with a tokenizer, or a Hugging Face id such as 'org/name'"
Ids = npt.NDArray[np.int32]


def read_tokenizer(name: str) -> Any:
    """Return a tokenizer: ``"bytes"``, or that of a folder or a Hugging Face model."""
    if name == BYTES:
        return byte_tokenizer()
    loader = require("transformers", extra="hf").AutoTokenizer.from_pretrained
    # A tokenizer may come without a model.
    files = ("tokenizer.json", "tokenizer_config.json")
    alone = any((Path(name) / file).is_file() for file in files)
    return loader(name) if alone else load_model(name, loader, wanted=_TOKENIZED)


def byte_tokenizer() -> Any:
    """Return a fast tokenizer with one token a byte, whose id is the byte, and one for the end.

    >>> tokenizer = byte_tokenizer()
    >>> tokenizer("Aé")["input_ids"], len(tokenizer)
    ([65, 195, 169], 257)
    >>> tokenizer.decode([65, 195, 169])
    'Aé'
    """
    tokenizers = require("tokenizers", extra="hf")
    transformers = require("transformers", extra="hf")
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    inner.decoder = tokenizers.decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END)


def _byte_characters() -> list[str]:
    """Return the printable character that byte-level tokenizers write for each byte."""
    plain = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def encode(tokenizer: Any, documents: Sequence[str]) -> Ids:
    """Token ids of documents in a row, the end token between them where there is one."""
    end = tokenizer.eos_token_id
    pieces: list[Ids] = []
    for number, text in enumerate(documents):
        if number and end is not None:
            pieces.append(np.array([end], dtype=np.int32))
        if tokenizer.vocab_size <= 257 and end == 256:
            pieces.append(np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32))
        else:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            pieces.append(np.asarray(ids, dtype=np.int32))
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)


class Blocks(Dataset[dict[str, Tensor]]):
    """Sequences of ``length`` tokens, one beginning where the one before ends.

    The token they share is given in one and predicted in the other, so that each token is
    predicted once.

    Parameters
    ----------
    ids
        ``(N,)``.
    length
        Tokens of a sequence.
    rest
        Whether a shorter sequence at the end counts.

    Examples
    --------
    >>> blocks = Blocks(np.arange(10, dtype=np.int32), 4)
    >>> [block["input_ids"].tolist() for block in blocks]
    [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    """

    def __init__(self, ids: Ids, length: int, rest: bool = False) -> None:
        self.ids, self.length = ids, length
        fresh = length - 1
        whole = (len(ids) - 1) // fresh
        count = math.ceil((len(ids) - 1) / fresh) if rest else whole
        self._count = max(count, 0)

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        start = index * (self.length - 1)
        ids = torch.from_numpy(self.ids[start : start + self.length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[index] for index in range(self._count))


@dataclass(frozen=True)
class LMData:
    """Token sequences to train on and to measure on.

    Attributes
    ----------
    train, dev
        Sequences.
    bytes_per_token
        Of the dev part.
    """

    train: Blocks
    dev: Blocks
    bytes_per_token: float

    @property
    def largest(self) -> int:
        """The largest token id."""
        return int(max(self.train.ids.max(), self.dev.ids.max()))

    @classmethod
    def of(cls, texts: Texts, tokenizer: Any, context: int, dev_bytes: int) -> LMData:
        """Tokenise texts.

        Raises
        ------
        InputError
            When there is less than one sequence in a part.
        """
        train = Blocks(encode(tokenizer, texts.parts["train"]), context)
        dev_text = first_bytes(texts.parts["dev"], dev_bytes)
        ids = encode(tokenizer, dev_text)
        dev = Blocks(ids, context, rest=True)
        for name, blocks in (("train", train), ("dev", dev)):
            if not len(blocks):
                raise InputError(
                    f"the {name} part of {texts.name} has {len(blocks.ids)} tokens, less than one "
                    f"sequence of {context}; give more text, or a smaller context"
                )
        size = sum(len(text.encode()) for text in dev_text)
        return cls(train, dev, size / len(ids))


def first_bytes(documents: Sequence[str], size: int) -> list[str]:
    """Take documents from the start until there are so many bytes; cut the last one."""
    taken: list[str] = []
    for text in documents:
        if size <= 0:
            break
        cut = text.encode()[:size].decode(errors="ignore")
        size -= len(cut.encode())
        taken.append(cut)
    return taken


@torch.no_grad()
def bits_per_byte(
    model: Any,
    data: LMData,
    batch_size: int,
    autocast: torch.dtype | None,
    processes: Processes | None = None,
) -> float:
    """Bits that the model needs for a byte of the dev part.

    Every token but the first is predicted once, from those before it in its sequence. Several
    processes share the work and find the same.
    """
    device = next(model.parameters()).device
    processes = processes or Processes()
    total = torch.zeros(2, dtype=torch.float64, device=device)
    blocks = list(data.dev)
    last = blocks.pop() if len(blocks[-1]["input_ids"]) < data.dev.length else None
    batches = [blocks[i : i + batch_size] for i in range(0, len(blocks), batch_size)]
    batches += [[last]] if last is not None else []
    with evaluating(model):
        for batch in batches[processes.rank :: processes.count]:
            ids = torch.stack([block["input_ids"] for block in batch]).to(device)
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                loss = model(input_ids=ids, labels=ids).loss
            count = ids.shape[0] * (ids.shape[1] - 1)
            total[0] += loss.double() * count
            total[1] += count
    nats, predicted = processes.total(total).tolist()
    return float(nats / predicted / math.log(2) / data.bytes_per_token)


def check_vocabulary(model: Any, largest: int) -> None:
    """Raise unless a model has an embedding of every token id up to the largest of the data."""
    try:
        rows = getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:  # a model that reads characters, say
        return
    if rows is not None and largest >= rows:
        raise InputError(
            f"the tokenizer gives token ids up to {largest}, but the model knows {rows} tokens; "
            "take the model's own tokenizer, or a vocab_size as large as the tokenizer's"
        )


def load_lm(name: str | None, config: dict[str, Any] | None, tokenizer: Any, dtype: str) -> Any:
    """Return a causal language model: a saved one, or one at random from a configuration."""
    transformers = require("transformers", extra="hf")
    wanted = getattr(torch, dtype)
    if name is not None:
        load = functools.partial(transformers.AutoModelForCausalLM.from_pretrained, dtype=wanted)
        return load_model(name, load, wanted=LANGUAGE_MODEL)
    values = {"vocab_size": len(tokenizer), **(config or {})}
    end = tokenizer.eos_token_id
    values = {"bos_token_id": end, "eos_token_id": end, "use_cache": False, **values}
    kind = values.pop("model_type")
    try:
        made = transformers.AutoConfig.for_model(kind, **values)
        return transformers.AutoModelForCausalLM.from_config(made, dtype=wanted)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"no causal language model from this config: {error}") from error
