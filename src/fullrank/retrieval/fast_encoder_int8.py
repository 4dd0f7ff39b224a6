"""The packed forward pass with 8-bit weights and activations, for CPUs with VNNI or AMX.

Weights are rounded a row at a time. Activations have one scale and zero point a layer, found
once from texts that are built in, so a vector never depends on what else is in its batch. Three
things keep the error small:

- channels of a layer norm's output differ widely, so they are evened out before rounding and the
  weight takes up the difference (SmoothQuant, arXiv 2211.10438, equation 4);
- the few hidden units with huge activations stay in floating point (as in LLM.int8(),
  arXiv 2208.07339);
- softmax, norms, residuals and embeddings stay in float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fullrank.retrieval.fast_encoder import (
    Chain,
    Factor,
    FloatBlock,
    Groups,
    PackedEncoder,
    UnsupportedModelError,
    attend,
    project,
)

# Share of a channel's range that moves from the activation to the weight. The paper's default is
# 0.5; on sentence encoders 0.75 leaves 30 to 40 % less error behind (weights are rounded a row
# at a time and take it well).
SMOOTHING = 0.75
# Hidden units of each layer that stay in floating point: the first four are the outliers.
FLOAT_UNITS = 16
# On CPUs with AMX 8-bit products are so fast that two thin ones gain nothing over one, and in a
# query's small batches lose, unless they hold at most this share of its weights and save so many:
# else factors are multiplied out.
THIN, SAVED = 0.5, 2**18
# Ranges seen in calibration are widened by this much before they are cut off.
MARGIN = 1.0


def is_supported() -> bool:
    """Whether this CPU multiplies 8-bit integers natively, and this torch knows how to ask.

    >>> is_supported() in (True, False)
    True
    """
    fast = getattr(torch.cpu, "_is_vnni_supported", lambda: False)()
    known = hasattr(torch.ops.onednn, "qlinear_pointwise") and hasattr(torch, "quantize_per_tensor")
    return bool(fast) and known


def has_amx() -> bool:
    """Whether this CPU multiplies tiles of 8-bit integers.

    >>> has_amx() in (True, False)
    True
    """
    return bool(getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)())


class Int8Linear:
    """``y = W x + b`` on unsigned 8-bit inputs.

    Parameters
    ----------
    factor
        Weight ``(m, n)`` and bias.
    low, high
        Range of the inputs.
    """

    def __init__(self, factor: Factor, low: float, high: float) -> None:
        weight, self.bias = factor
        low, high = min(low * MARGIN, 0.0), max(high * MARGIN, 1e-6)
        self.scale = (high - low) / 255
        self.zero = round(-low / self.scale)
        self.weight_scales = weight.abs().amax(1).clamp_min(1e-12) / 127
        rounded = (weight / self.weight_scales[:, None]).round().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(rounded, None)
        self.weight_zeros = torch.zeros(len(weight), dtype=torch.int64)

    def round(self, x: Tensor) -> Tensor:
        """Round float inputs to the 8-bit integers this layer takes."""
        rounded = torch.quantize_per_tensor(x, self.scale, self.zero, torch.quint8)
        # The integers themselves; int_repr() would copy them.
        integers = torch.empty(0, dtype=torch.uint8)
        return integers.set_(rounded.untyped_storage(), 0, x.shape, x.stride())

    def __call__(
        self, x: Tensor, into: Int8Linear | None = None, activation: str = "none"
    ) -> Tensor:
        """Return the output in float32, or rounded for the layer that comes next."""
        if into is None:
            scale, zero, dtype = 1.0, 0, torch.float32
        else:
            scale, zero, dtype = into.scale, into.zero, torch.uint8
        result: Tensor = torch.ops.onednn.qlinear_pointwise(
            *self._operands(x), self.bias, scale, zero, dtype, activation, [], "none"
        )
        return result

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """Return the output added to ``other``, in float32."""
        sum_with: tuple[Any, ...] = ("add", 1.0, "none", [], "")
        result: Tensor = torch.ops.onednn.qlinear_pointwise.binary(
            *self._operands(x), other, self.bias, 1.0, 0, torch.float32, 1.0, 0, *sum_with
        )
        return result

    def _operands(self, x: Tensor) -> tuple[Tensor, float, int, Tensor, Tensor, Tensor]:
        return x, self.scale, self.zero, self.weight, self.weight_scales, self.weight_zeros


class Int8Chain:
    """One or two 8-bit factors; between two, activations stay 8-bit integers.

    Parameters
    ----------
    chain
        The factors in float32.
    inputs
        Calibration inputs ``(T, n)``.
    smooth
        Whether to even out the input channels; the inputs then have to pass :meth:`round`.
    drop
        Input channels that someone else takes care of.
    """

    def __init__(
        self, chain: Chain, inputs: Tensor, *, smooth: bool = False, drop: Tensor | None = None
    ) -> None:
        weight, bias = chain[0]
        if drop is not None:
            weight, inputs = weight.index_fill(1, drop, 0), inputs.index_fill(1, drop, 0)
        self.inverse: Tensor | None = None
        if smooth:
            size = _smoothing_scales(inputs, weight)
            weight, inputs, self.inverse = weight * size, inputs / size, 1 / size
        low, high = _range(inputs)
        if len(chain) == 2:
            # Components of a product differ in size: even out the thin activations for free.
            thin = functional.linear(inputs, weight, bias)
            size = thin.abs().amax(0).clamp_min(1e-6)
            weight = weight / size[:, None]
            bias = None if bias is None else bias / size
            second = Factor(chain[1].weight * size, chain[1].bias)
            self.layers = [Int8Linear(Factor(weight, bias), low, high)]
            self.layers.append(Int8Linear(second, *_range(thin / size)))
        else:
            self.layers = [Int8Linear(Factor(weight, bias), low, high)]

    def round(self, x: Tensor) -> Tensor:
        """Round float inputs to what this chain takes."""
        return self.layers[0].round(x if self.inverse is None else x * self.inverse)

    def _thin(self, x: Tensor) -> Tensor:
        for layer, following in zip(self.layers[:-1], self.layers[1:], strict=True):
            x = layer(x, into=following)
        return x

    def __call__(self, x: Tensor) -> Tensor:
        """Map rounded inputs to float32."""
        return self.layers[-1](self._thin(x))

    def of_floats(self, x: Tensor) -> Tensor:
        """Map float inputs to float32."""
        return self(self.round(x))

    def plus(self, x: Tensor, other: Tensor) -> Tensor:
        """Map rounded inputs to float32 and add ``other``."""
        return self.layers[-1].plus(self._thin(x), other)

    def gelu(self, x: Tensor, into: Int8Chain) -> Tensor:
        """Map rounded inputs, apply GELU, round for ``into``."""
        return self.layers[-1](self._thin(x), into=into.layers[0], activation="gelu")


class Int8Block:
    """A transformer layer with 8-bit linear maps, made from a float one and what it saw."""

    def __init__(self, block: FloatBlock, h: Tensor, groups: Groups) -> None:
        if not _is_exact_gelu(block.activation):
            raise UnsupportedModelError("an activation other than GELU")
        seen = block.trace(h, groups)
        self.float_out = seen.out
        self.heads, self.norms = block.heads, block.norms
        self.projections = [Int8Chain(c, seen.entry, smooth=True) for c in block.projections]
        self.out = Int8Chain(block.out, seen.context)
        width = seen.hidden.shape[-1]
        units = seen.hidden.abs().amax(0).topk(min(FLOAT_UNITS, width)).indices
        self.up = Int8Chain(block.up, seen.middle, smooth=True)
        self.down = Int8Chain(block.down, seen.hidden, drop=units)
        self.unit_up, self.unit_bias = _rows(block.up, units)
        self.unit_down = _columns(block.down, units)

    def __call__(self, h: Tensor, groups: Groups) -> Tensor:
        """Return the layer's output ``(T, d)``, in float32."""
        qkv = project([chain.of_floats for chain in self.projections], h)
        context = attend(qkv, groups, self.heads)
        h = self.norms[0](self.out.plus(self.out.round(context), h))
        units = functional.gelu(torch.addmm(self.unit_bias, h, self.unit_up))
        hidden = self.up.gelu(self.up.round(h), into=self.down)
        return self.norms[1](self.down.plus(hidden, torch.addmm(h, units, self.unit_down)))


def quantize(model: PackedEncoder, sequences: Sequence[Sequence[int]]) -> PackedEncoder:
    """Return a packed encoder in 8 bits, calibrated on token sequences.

    Parameters
    ----------
    model
        A float32 one, as :func:`~fullrank.retrieval.fast_encoder.read_model` returns it.
    sequences
        Token ids, a few thousand tokens of varied text.

    Raises
    ------
    UnsupportedModelError
        When an activation is not the exact GELU.
    """
    _warn_once()
    h, groups = model.embed(sorted(sequences, key=len))
    blocks = []
    for block in model.blocks:
        assert isinstance(block, FloatBlock)
        blocks.append(Int8Block(block.with_maps(_quicker) if has_amx() else block, h, groups))
        h = blocks[-1].__dict__.pop("float_out")
    return PackedEncoder(
        model.words, model.positions, model.norm, blocks, model.pooling, model.head
    )


def _quicker(chain: Chain) -> Chain:
    """Keep two factors on a CPU with AMX where they are thin enough to gain by it."""
    if len(chain) == 1:
        return chain
    first, second = (factor.weight for factor in chain)
    whole, thin = second.shape[0] * first.shape[1], first.numel() + second.numel()
    pays = thin <= THIN * whole and whole - thin >= SAVED
    return chain if pays else chain.multiplied_out()


def _warn_once() -> None:
    """Let torch say now, unheard, what it says once: that tensors of quantised types will go."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)


def _is_exact_gelu(activation: object) -> bool:
    probe = torch.linspace(-4, 4, 65)
    try:
        return torch.allclose(activation(probe), functional.gelu(probe), atol=1e-6)  # type: ignore[operator]
    except Exception:
        return False


def _smoothing_scales(inputs: Tensor, weight: Tensor) -> Tensor:
    seen = inputs.abs().amax(0).clamp_min(1e-3)
    held = weight.abs().amax(0).clamp_min(1e-4)
    size = seen**SMOOTHING / held ** (1 - SMOOTHING)
    return size / size.mean()


def _range(x: Tensor) -> tuple[float, float]:
    low, high = x.aminmax()
    return low.item(), high.item()


def _rows(chain: Chain, rows: Tensor) -> tuple[Tensor, Tensor]:
    """``(n, k)`` weight and ``(k,)`` bias of some outputs of a linear map."""
    weight, bias = chain[-1]
    picked = weight[rows]
    for factor in reversed(chain[:-1]):
        picked = picked @ factor.weight
    bias = torch.zeros(len(rows)) if bias is None else bias[rows]
    return picked.T.contiguous(), bias


def _columns(chain: Chain, columns: Tensor) -> Tensor:
    """``(k, m)`` weight of some inputs of a linear map."""
    picked = chain[0].weight[:, columns]
    for factor in chain[1:]:
        picked = factor.weight @ picked
    return picked.T.contiguous()
