"""Eight-bit weights for shrunk models: the two thin layers of each pair, quantised one by one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.compress.factorization import replace_modules
from fullrank.compress.layers import LowRankLinear
from fullrank.compress.layers_record import factorised
from fullrank.core.errors import InputError, require


class LinearPair(nn.Module):
    """The factors of a :class:`~fullrank.compress.LowRankLinear` as two ``nn.Linear``.

    What knows ``nn.Linear`` alone, as PyTorch's quantisation does, sees both.

    Attributes
    ----------
    first
        ``in -> r``, without a bias.
    second
        ``r -> out``.
    """

    def __init__(self, layer: LowRankLinear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.first = nn.Linear(layer.in_features, layer.rank, bias=False, device="meta")
        self.second = nn.Linear(
            layer.rank, layer.out_features, bias=layer.bias is not None, device="meta"
        )
        # The same parameters, not copies.
        self.first.weight, self.second.weight = layer.first, layer.second
        if layer.bias is not None:
            self.second.bias = layer.bias  # type: ignore[assignment]
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(..., in)`` to ``(..., out)``."""
        y: Tensor = self.second(self.first(x))
        return y

    def weight(self) -> Tensor:
        """The matrix multiplied out: a method, as of PyTorch's quantised layers.

        Models that look at a layer's weight before they call it tell quantised layers by that.
        """
        first, second = (
            layer.weight() if callable(layer.weight) else layer.weight
            for layer in (self.first, self.second)
        )
        return second.dequantize() @ first.dequantize()


def quantize_int8(model: nn.Module, *, dense: bool = True) -> nn.Module:
    """Return a copy for CPUs with 8-bit weights in its linear layers, factorised ones included.

    Weights are stored in 8 bits, each matrix with one scale; activations are quantised batch by
    batch (PyTorch's dynamic quantisation), so that nothing is calibrated. PyTorch's own function
    passes factorised layers by: their factors are no ``nn.Linear``.

    Parameters
    ----------
    model
        In float32, on the CPU; it is not changed.
    dense
        Whether the linear layers that are not factorised are quantised too.

    Returns
    -------
    Module
        In evaluation mode; it cannot be trained. PyTorch does not export it: for ONNX, export the
        model as it is and call :func:`quantize_onnx`.

    Raises
    ------
    InputError
        When the model has no linear layer to quantise, is not on the CPU or not in float32, or
        this build of PyTorch has no 8-bit kernels.

    Examples
    --------
    >>> from fullrank.compress import FractionOfBreakEven, factorize, make_plan
    >>> model = nn.Sequential(nn.Linear(64, 64))
    >>> _ = factorize(model, make_plan(model, FractionOfBreakEven(0.5)))
    >>> small, x = quantize_int8(model), torch.randn(8, 64)
    >>> bool((small(x) - model(x)).norm() < 0.05 * model(x).norm())
    True
    """
    _check(model)
    small = copy.deepcopy(model).eval()
    pairs: dict[str, nn.Module] = {
        name: LinearPair(layer)
        for name, layer in factorised(small)
        if isinstance(layer, LowRankLinear)
    }
    replace_modules(small, pairs)
    inside = {id(m) for pair in pairs.values() for m in pair.modules()}
    names = {
        name
        for name, module in small.named_modules()
        if type(module) is nn.Linear and (dense or id(module) in inside)
    }
    if not names:
        raise InputError("the model has no linear layer to quantise")
    with warnings.catch_warnings():
        # That this function will move to another library, and how its observers sum.
        warnings.simplefilter("ignore")
        settings = dict.fromkeys(names, torch.ao.quantization.default_dynamic_qconfig)
        quantise: Any = torch.ao.quantization.quantize_dynamic
        made: nn.Module = quantise(small, settings)
    return made


def quantize_onnx(source: str | Path, target: str | Path) -> Path:
    """Write an exported model again with 8-bit weights in its matrix products, for onnxruntime.

    A shrunk model exports its factors as two products a layer; both are quantised.

    Parameters
    ----------
    source
        From ``torch.onnx.export`` of the shrunk model in float32.
    target
        Another file.

    Raises
    ------
    InputError
        When there is no such file, or both are one.
    MissingExtraError
        Without onnxruntime and onnx (extra ``onnx``).
    """
    file, out = Path(source), Path(target)
    if not file.is_file():
        raise InputError(f"there is no exported model at {file}")
    if file.resolve() == out.resolve():
        raise InputError(f"{out} is the model to quantise itself; give another file")
    require("onnx", extra="onnx")
    library = require("onnxruntime.quantization", extra="onnx")
    library.quantize_dynamic(
        str(file),
        str(out),
        op_types_to_quantize=["MatMul", "Gemm"],
        weight_type=library.QuantType.QInt8,
    )
    return out


def _check(model: nn.Module) -> None:
    engines = [e for e in torch.backends.quantized.supported_engines if e != "none"]
    if not engines:
        raise InputError("this build of PyTorch has no 8-bit kernels")
    for name, parameter in model.named_parameters():
        if parameter.device.type != "cpu" or parameter.dtype != torch.float32:
            raise InputError(
                f"{name} is {parameter.dtype} on {parameter.device}; 8-bit layers are made from "
                "float32 on the CPU: model.float().cpu()"
            )
