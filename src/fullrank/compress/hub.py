"""Shrunk models in the Hugging Face world: a quantization config that builds factor shapes.

transformers lets a checkpoint say how its layers differ from the architecture's by a
``quantization_config`` in its ``config.json``. Ours, ``quant_method: "fullrank"``, lists which
layers are factorised and at which rank; when such a folder is loaded, those layers are built as
factors before the weights are read. The list is made anew whenever the config is written: ranks may
have changed since, or layers have become dense.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from fullrank.core.errors import StoreError

QUANT_METHOD = "fullrank"
FORMAT = 3


def register() -> None:
    """Make transformers load shrunk models; called by ``import fullrank``, harmless twice."""
    # Importing transformers' registry below calls this before the classes exist; the last line
    # of this module then does what is left to do. So this function stands above that import.
    if "FullrankQuantizer" not in globals():
        return
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(FullrankConfig)
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(QUANT_METHOD)(FullrankQuantizer)


from transformers.quantizers.auto import (  # noqa: E402
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer  # noqa: E402
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402


class FullrankConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Which layers of a checkpoint are factorised.

    Parameters
    ----------
    layers
        Module name -> ``{"shape": [out, in], "rank": r, "bias": bool, "method": ..., "error":
        ...}``; of a convolution also its ``"scheme"``, and the shape is that of its kernel. The
        rank is None where the layer is dense, with a bias that the architecture has not.
    format
        Version of this record; by default the oldest that can say this.
    """

    # Whose layers these are, as far as it is still there.
    _model: weakref.ref[nn.Module] | None = None

    def __init__(
        self,
        layers: Mapping[str, Mapping[str, Any]] | None = None,
        format: int | None = None,
        **_: Any,
    ) -> None:
        from fullrank.compress.layers_record import record_format

        self.quant_method = QUANT_METHOD
        if format is None:
            format = record_format(layers or {})
        if format > FORMAT:
            raise StoreError(
                f"this model was shrunk by a newer fullrank (format {format}, this one reads up "
                f"to {FORMAT}): upgrade fullrank"
            )
        self.format = format
        self.layers = {name: dict(layer) for name, layer in (layers or {}).items()}

    def follow(self, model: nn.Module | None) -> FullrankConfig:
        """Be of this model, as it is whenever this config is written."""
        self._model = None if model is None else weakref.ref(model)
        return self

    def to_dict(self) -> dict[str, Any]:
        """Return what ``config.json`` says."""
        from fullrank.compress.layers_record import describe, factorised, record_format

        model = None if self._model is None else self._model()
        # Of sharded factors (FSDP, DeepSpeed) the shapes do not tell; there ranks stay as they are.
        if model is not None and all(_is_whole(layer) for _, layer in factorised(model)):
            self.layers = describe(model)
            self.format = record_format(self.layers)
        layers = copy.deepcopy(self.layers)
        return {"quant_method": self.quant_method, "format": self.format, "layers": layers}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __deepcopy__(self, memo: dict[int, Any]) -> FullrankConfig:
        """Copy it; with a model that is being copied, to be of that copy."""
        state = self.to_dict()
        model = None if self._model is None else self._model()
        return FullrankConfig(state["layers"], state["format"]).follow(memo.get(id(model)))

    def __getstate__(self) -> dict[str, Any]:
        return self.to_dict()


class FullrankQuantizer(HfQuantizer):  # type: ignore[misc]
    """Builds the factorised layers when a shrunk checkpoint is loaded."""

    requires_calibration = True
    is_trainable = True
    is_qat_trainable = True
    is_compileable = True

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Shrunk models save like any other."""
        return True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        from fullrank.compress.factorization import replace_modules

        replace_modules(model, _shells(model, self.quantization_config.layers))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
        _check_loaded(model)
        mark_pretrained(model)
        # From here on it is an ordinary model: what transformers forbids on quantised weights
        # (casting, training without adapters) is fine. The config stays, for the next save.
        model.hf_quantizer = None
        model.is_quantized = False

    def _dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        from fullrank.compress.store import to_dense

        return to_dense(model)


def _shells(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Empty layers for what a config lists, by the names this class has for them."""
    from fullrank.compress.layers_record import layer_for, stands_for
    from fullrank.core.names import canonical_modules

    modules = dict(canonical_modules(model))
    # A checkpoint saved with a head names its layers under the base model's prefix; loaded
    # without the head (or the other way round) they are known without it.
    prefix = getattr(model, "base_model_prefix", "") + "."
    shells = {}
    for name, layer in layers.items():
        if not {"shape", "rank", "bias"} <= set(layer):
            raise StoreError(f"config.json does not say how {name} was factorised")
        forms = (name, name.removeprefix(prefix), prefix + name)
        found = next((form for form in forms if form in modules), None)
        if found is None:
            # Part of a head that this class does not have.
            continue
        module = modules[found]
        if not stands_for(layer, module):
            shape = " x ".join(map(str, layer["shape"]))
            raise StoreError(
                f"the shrunk model lists {name} as {shape}, the architecture has "
                f"{_shape(module)}: config.json does not belong to these weights"
            )
        shells[found] = layer_for(module, layer)
    return shells


def _check_loaded(model: nn.Module) -> None:
    """Raise where a factor was not in the checkpoint: it would hold whatever the memory held."""
    from fullrank.compress.layers_record import factorised

    loaded = {id(p) for p in model.parameters() if getattr(p, "_is_hf_initialized", False)}
    if not loaded:
        return  # a way of loading that does not tell
    for name, layer in factorised(model):
        for part in (layer.first, layer.second):
            if id(part) not in loaded and not part.is_meta:
                raise StoreError(
                    f"config.json lists {name} as factorised, but its factors are not among the "
                    "weights: it does not belong to them"
                )


def _shape(module: nn.Module) -> str:
    shape = getattr(getattr(module, "weight", None), "shape", None)
    return f"a {type(module).__name__}" if shape is None else str(tuple(shape))


def mark_pretrained(model: nn.Module) -> None:
    """Write what is factorised into the config of a transformers model, and of those inside."""
    from transformers import PreTrainedModel

    from fullrank.compress.layers_record import describe

    # A model with a head and the base model in it share one config: the outer one's names count.
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and id(module.config) not in seen:
            seen.add(id(module.config))
            layers = describe(module)
            if layers:
                module.config.quantization_config = FullrankConfig(layers).follow(module)
            elif _is_ours(getattr(module.config, "quantization_config", None)):
                del module.config.quantization_config


def _is_ours(config: Any) -> bool:
    method = config.get("quant_method") if isinstance(config, Mapping) else config
    return isinstance(config, FullrankConfig) or method == QUANT_METHOD


def _is_whole(layer: Any) -> bool:
    """Whether a layer's factors are there with their shapes, and not as flat shards."""
    first, second = getattr(layer, "first", None), getattr(layer, "second", None)
    return first is not None and second is not None and min(first.ndim, second.ndim) > 1


register()
