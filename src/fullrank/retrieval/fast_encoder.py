"""The forward pass of a BERT-like encoder over packed sequences.

A batch is one long row of tokens without any padding: linear layers, norms and activations see
all tokens in one matrix, attention runs once for each length that occurs. The result is what the
model itself computes; which modules are understood is checked here, what they compute is checked
by the caller on probe texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

Groups = Sequence[tuple[int, int]]
"""``(count, length)`` of the runs of equally long sequences in a packed batch."""

# Class -> whether positions start behind the padding index, as RoBERTa's do.
_ARCHITECTURES = {
    "BertModel": False,
    "RobertaModel": True,
    "XLMRobertaModel": True,
    "CamembertModel": True,
}
_POOLING = ("mean", "cls")
_HEADS = ("Normalize", "Dense", "LayerNorm")


class UnsupportedModelError(Exception):
    """A model has a part that the packed forward pass does not know."""


class Norm(NamedTuple):
    """Weight, bias and epsilon of a layer norm."""

    weight: Tensor
    bias: Tensor
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        return functional.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class Factor(NamedTuple):
    """A weight ``(out, in)`` and a bias ``(out,)`` or None."""

    weight: Tensor
    bias: Tensor | None


class Chain(tuple[Factor, ...]):
    """A linear map as the product of its factors, first one applied first: one, or two thin."""

    def __call__(self, x: Tensor) -> Tensor:
        """Apply the factors one after the other."""
        for weight, bias in self:
            x = functional.linear(x, weight, bias)
        return x

    def multiplied_out(self) -> Chain:
        """Return the same map as one matrix."""
        if len(self) == 1:
            return self
        first, second = self
        assert first.bias is None
        return Chain([Factor(second.weight @ first.weight, second.bias)])


class Trace(NamedTuple):
    """What flows through a block: the inputs of its four linear stages, and its output."""

    entry: Tensor
    context: Tensor
    middle: Tensor
    hidden: Tensor
    out: Tensor


class Block(Protocol):
    """One transformer layer over packed tokens ``(T, d)``."""

    def __call__(self, h: Tensor, groups: Groups) -> Tensor:
        """Return the layer's output ``(T, d)``."""
        ...


class FloatBlock:
    """A post-norm transformer layer in floating point."""

    def __init__(
        self,
        projections: tuple[Chain, ...],
        out: Chain,
        up: Chain,
        down: Chain,
        norms: tuple[Norm, Norm],
        activation: Callable[[Tensor], Tensor],
        heads: int,
    ) -> None:
        self.projections = _fused(projections)
        self.out, self.up, self.down = out, up, down
        self.norms = norms
        self.activation = activation
        self.heads = heads

    def with_maps(self, function: Callable[[Chain], Chain]) -> FloatBlock:
        """Return the layer with other forms of its linear maps."""
        out, up, down = map(function, (self.out, self.up, self.down))
        projections = tuple(map(function, self.projections))
        return FloatBlock(projections, out, up, down, self.norms, self.activation, self.heads)

    def trace(self, h: Tensor, groups: Groups) -> Trace:
        """Run the layer and keep what its linear stages were given."""
        context = attend(project(self.projections, h), groups, self.heads)
        middle = self.norms[0](self.out(context).add_(h))
        hidden = self.activation(self.up(middle))
        return Trace(h, context, middle, hidden, self.norms[1](self.down(hidden).add_(middle)))

    def __call__(self, h: Tensor, groups: Groups) -> Tensor:
        """Return the layer's output ``(T, d)``."""
        return self.trace(h, groups).out


def _fused(projections: tuple[Chain, ...]) -> tuple[Chain, ...]:
    """Make one matrix of three, where they are one each."""
    if len(projections) == 1 or any(len(each) > 1 or each[0].bias is None for each in projections):
        return projections
    weights, biases = zip(*(each[0] for each in projections), strict=True)
    return (Chain([Factor(torch.cat(weights), torch.cat(biases))]),)


def project(
    projections: Sequence[Callable[[Tensor], Tensor]], x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``(T, d)``: from one fused projection, or from three."""
    if len(projections) == 1:
        q, k, v = projections[0](x).chunk(3, dim=-1)
    else:
        q, k, v = (projection(x) for projection in projections)
    return q, k, v


def attend(qkv: tuple[Tensor, Tensor, Tensor], groups: Groups, heads: int) -> Tensor:
    """Scaled dot-product attention inside each sequence of a packed batch."""
    tokens, width = qkv[0].shape
    out = qkv[0].new_empty(tokens, width)
    start = 0
    for count, length in groups:
        stop = start + count * length
        shape = (count, length, heads, width // heads)
        q, k, v = (part[start:stop].view(shape).transpose(1, 2) for part in qkv)
        result = functional.scaled_dot_product_attention(q, k, v)
        out[start:stop].view(shape).copy_(result.transpose(1, 2))
        start = stop
    # Rows that fill up the batch belong to no sequence.
    out[start:].zero_()
    return out


def filled(tokens: int) -> int:
    """Rows to compute for so many tokens: one of few sizes, at most an eighth more.

    CPU libraries compile a kernel for every size of matrix they meet, which takes longer than a
    short query's whole forward pass.

    >>> [filled(tokens) for tokens in (3, 17, 64, 65, 1000, 4001)]
    [8, 24, 64, 72, 1024, 4096]
    """
    step = max(8, 1 << max(0, tokens.bit_length() - 4))
    return -(-tokens // step) * step


class PackedEncoder:
    """A sentence-transformers model whose transformer runs over packed tokens.

    Build one with :func:`read_model`.

    Parameters
    ----------
    words
        Token embeddings ``(vocabulary, d)``.
    positions
        Position embeddings ``(positions, d)`` with what every token gets (its type) added.
    norm
        Layer norm behind the embeddings.
    blocks
        Transformer layers.
    pooling
        ``"mean"`` or ``"cls"``.
    head
        Modules behind the pooling, called on the float32 embeddings.
    """

    def __init__(
        self,
        words: Tensor,
        positions: Tensor,
        norm: Norm,
        blocks: Sequence[Block],
        pooling: str,
        head: Sequence[nn.Module],
    ) -> None:
        self.words, self.positions, self.norm = words, positions, norm
        self.blocks = blocks
        self.pooling = pooling
        self.head = head

    def embed(self, sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Groups]:
        """Return packed embeddings ``(T, d)`` of token ids, and the groups of equal length."""
        groups = [(len(list(run)), length) for length, run in groupby(map(len, sequences))]
        ids = torch.tensor(list(chain.from_iterable(sequences)), dtype=torch.long)
        h = functional.embedding(ids, self.words)
        start = 0
        for count, length in groups:
            part = h[start : start + count * length].view(count, length, -1)
            part += self.positions[:length]
            start += count * length
        return self.norm(h), groups

    def __call__(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """Encode token ids, special tokens included.

        Parameters
        ----------
        sequences
            Non-empty lists of ids. Fast when equal lengths stand side by side.

        Returns
        -------
        Tensor
            ``(len(sequences), d)``, float32.
        """
        h, groups = self.embed(sequences)
        h = functional.pad(h, (0, 0, 0, filled(len(h)) - len(h)))
        for block in self.blocks:
            h = block(h, groups)
        pooled = h.new_empty(len(sequences), h.shape[-1], dtype=torch.float32)
        row = start = 0
        for count, length in groups:
            part = h[start : start + count * length].view(count, length, -1)
            pooled[row : row + count] = part[:, 0] if self.pooling == "cls" else part.mean(1)
            row += count
            start += count * length
        features: dict[str, Any] = {"sentence_embedding": pooled}
        for module in self.head:
            features = module(features)
        embedding: Tensor = features["sentence_embedding"]
        return embedding


def read_model(model: Any, dtype: torch.dtype = torch.float32) -> PackedEncoder:
    """Read the packed forward pass of a SentenceTransformer on the CPU.

    Parameters
    ----------
    model
        Transformer, pooling (mean or first token), then any of Normalize, Dense and LayerNorm.
        It is left as it is; weights that need no cast or fusion are shared with it.
    dtype
        Of the transformer's weights and activations.

    Raises
    ------
    UnsupportedModelError
        When a module is of a kind that is not known here, or carries hooks.
    """
    modules = list(model)
    names = [type(module).__name__ for module in modules]
    if len(modules) < 2 or names[:2] != ["Transformer", "Pooling"]:
        raise UnsupportedModelError(f"its modules are {names}, not Transformer and Pooling")
    if unknown := set(names[2:]) - set(_HEADS):
        raise UnsupportedModelError(f"unknown modules {sorted(unknown)}")
    pooling = modules[1]
    if pooling.pooling_mode not in _POOLING or not pooling.include_prompt:
        raise UnsupportedModelError(f"pooling {pooling.pooling_mode!r}")
    inner = modules[0].auto_model
    kind = type(inner).__name__
    if kind not in _ARCHITECTURES:
        raise UnsupportedModelError(f"the architecture {kind}")
    if inner.config.is_decoder or inner.config.add_cross_attention:
        raise UnsupportedModelError("a decoder")
    try:
        return _read_transformer(inner, dtype, pooling.pooling_mode, modules[2:])
    except AttributeError as error:
        raise UnsupportedModelError(f"a layer laid out in another way ({error})") from error


def _read_transformer(
    inner: Any, dtype: torch.dtype, pooling: str, head: Sequence[nn.Module]
) -> PackedEncoder:
    table = inner.embeddings
    first = table.padding_idx + 1 if _ARCHITECTURES[type(inner).__name__] else 0
    words = _embedding(table.word_embeddings)
    positions = _embedding(table.position_embeddings)[first:].float()
    positions = positions + _embedding(table.token_type_embeddings)[0].float()
    return PackedEncoder(
        words.to(dtype),
        positions.to(dtype),
        _norm(table.LayerNorm, dtype),
        [_block(layer, dtype) for layer in inner.encoder.layer],
        pooling,
        head,
    )


def _block(layer: Any, dtype: torch.dtype) -> FloatBlock:
    attention, inside = layer.attention, layer.attention.self
    return FloatBlock(
        tuple(_chain(m, dtype) for m in (inside.query, inside.key, inside.value)),
        _chain(attention.output.dense, dtype),
        _chain(layer.intermediate.dense, dtype),
        _chain(layer.output.dense, dtype),
        (_norm(attention.output.LayerNorm, dtype), _norm(layer.output.LayerNorm, dtype)),
        layer.intermediate.intermediate_act_fn,
        inside.num_attention_heads,
    )


def _checked(module: nn.Module, *kinds: str) -> Any:
    """Return a module whose ``forward`` is known: its class is, and nothing hooks into it."""
    if type(module).__name__ not in kinds:
        raise UnsupportedModelError(f"a {type(module).__name__} in the place of {kinds[0]}")
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        raise UnsupportedModelError(f"a {type(module).__name__} with hooks")
    return module


def _embedding(module: nn.Module) -> Tensor:
    weight: Tensor = _checked(module, "Embedding").weight
    return weight.detach()


def _norm(module: nn.Module, dtype: torch.dtype) -> Norm:
    norm = _checked(module, "LayerNorm")
    return Norm(norm.weight.detach().to(dtype), norm.bias.detach().to(dtype), norm.eps)


def _chain(module: nn.Module, dtype: torch.dtype) -> Chain:
    linear = _checked(module, "Linear", "LowRankLinear")
    pairs = (
        [(linear.weight, linear.bias)]
        if type(module).__name__ == "Linear"
        else [(linear.first, None), (linear.second, linear.bias)]
    )
    return Chain(
        Factor(w.detach().to(dtype), None if b is None else b.detach().to(dtype)) for w, b in pairs
    )
