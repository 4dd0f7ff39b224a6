"""Choose the packed forward pass for a model, and prove it on texts before it is used."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fullrank.core.modes import evaluating
from fullrank.retrieval import fast_encoder_int8 as int8
from fullrank.retrieval.fast_encoder import PackedEncoder, UnsupportedModelError, read_model
from fullrank.retrieval.fast_encoder_texts import CALIBRATION, CHECK

Tokenize = Callable[[Sequence[str]], Sequence[Any]]

# Largest difference of a unit vector's components from the model's own, in float32.
_FLOAT32_TOLERANCE = 1e-5
# Smallest mean cosine to the model's own vectors, in bfloat16 and int8.
_LEAST_COSINE = 0.99
# Sequences of random tokens that are calibrated on as well: whatever the language of the built-in
# texts, the whole vocabulary takes part.
_RANDOM_LENGTHS = (6, 12, 24, 48, 96, 128)


def checked_engine(model: Any, dtype: str, tokenize: Tokenize) -> tuple[str, PackedEncoder]:
    """Return the dtype that is used and the packed encoder for it.

    Parameters
    ----------
    model
        A SentenceTransformer on the CPU.
    dtype
        ``"auto"`` tries the fastest first.
    tokenize
        Texts -> encodings with ``ids``, cut to the limit, special tokens included.

    Raises
    ------
    UnsupportedModelError
        When the model has unknown parts, or does not compute what is expected of it.
    """
    expected = _reference(model, tokenize)
    probes = [e.ids for e in tokenize(CHECK)]
    tried = [dtype]
    if dtype == "auto":
        pays = bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())
        tried = ["int8"] * int8.is_supported() + ["bfloat16"] * pays + ["float32"]
    for name in tried:
        try:
            return name, _checked(_engine(model, name, tokenize), name, probes, expected)
        except (UnsupportedModelError, RuntimeError) as error:
            reason = error
    raise UnsupportedModelError(str(reason)) from reason


def _engine(model: Any, dtype: str, tokenize: Tokenize) -> PackedEncoder:
    if dtype == "bfloat16":
        return read_model(model, torch.bfloat16)
    if dtype == "float32":
        return read_model(model)
    if not int8.is_supported():
        raise UnsupportedModelError("a CPU or a torch without native 8-bit products")
    encodings = tokenize(CALIBRATION)
    limit = max(len(e.ids) for e in encodings)
    return int8.quantize(read_model(model), [e.ids for e in encodings] + _random(model, limit))


def _random(model: Any, limit: int) -> list[list[int]]:
    vocabulary = model[0].auto_model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(vocabulary, (min(length, limit),), generator=generator).tolist()
        for length in _RANDOM_LENGTHS
    ]


def _reference(model: Any, tokenize: Tokenize) -> Tensor:
    """Encode the check texts with the model itself; its tokens have to be ours."""
    expected = []
    try:
        with evaluating(model):
            for text in CHECK:
                features = model.preprocess([text])
                expected.append(model(features)["sentence_embedding"][0])
                ids, own = features["input_ids"][0].tolist(), tokenize([text])[0].ids
                if ids[: len(own) - 1] != own[:-1]:
                    raise UnsupportedModelError("tokens that differ from its tokenizer's")
    except (KeyError, TypeError) as error:
        raise UnsupportedModelError(f"features of another kind ({error!r})") from error
    return functional.normalize(torch.stack(expected).float(), dim=-1)


def _checked(
    packed: PackedEncoder, dtype: str, probes: Sequence[Sequence[int]], expected: Tensor
) -> PackedEncoder:
    order = sorted(range(len(probes)), key=lambda i: len(probes[i]))
    found = functional.normalize(packed([probes[i] for i in order]), dim=-1)
    difference = (found - expected[order]).abs().max().item()
    cosine = (found * expected[order]).sum(-1).mean().item()
    same_dtype = dtype == "float32" and packed.words.dtype == torch.float32
    passed = difference <= _FLOAT32_TOLERANCE if same_dtype else cosine >= _LEAST_COSINE
    if not passed:
        raise UnsupportedModelError(
            f"results that differ in {dtype} (by {difference:.1e}, cosine {cosine:.4f})"
        )
    return packed
