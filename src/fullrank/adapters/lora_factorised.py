"""LoRA on factorised layers: PEFT's own, which merges into the dense layer they stand for.

Importing this module puts it into PEFT's table of tuners in the place of PEFT's LoRA, which it is
on all other layers.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fullrank.adapters.bases import (
    include_all_linear,
    is_factorised,
    record_factorised,
    shape_of,
)
from fullrank.core.errors import require

_lora: Any = require("peft.tuners.lora", extra="adapters")
_tuners: Any = require("peft.tuners.tuners_utils", extra="adapters")
_mapping: Any = require("peft.mapping", extra="adapters")
_types: Any = require("peft.utils.peft_types", extra="adapters")


class LoraFactorisedLinear(_lora.Linear):  # type: ignore[misc]
    """PEFT's LoRA layer around factors.

    While adapters are merged, the dense layer is in the factors' place.
    """

    base_layer: Any
    _factors: tuple[nn.Module, ...] = ()

    def __init__(self, base_layer: Any, adapter_name: str, config: Any, **options: Any) -> None:
        config = copy.copy(config)
        config.fan_in_fan_out = base_layer.transposed
        super().__init__(base_layer, adapter_name, config, **options)

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        out, width = shape_of(module)
        return width, out

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the dense layer in the factors' place, and add adapters to its weight."""
        names = _tuners.check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        if not self._factors:
            # In a tuple, lest it is a part of the model.
            self._factors = (self.base_layer,)
            self.base_layer = self.base_layer.to_dense()
        try:
            super().merge(safe_merge, names)
        except BaseException:
            if not self.merged_adapters:
                self._put_back()
            raise

    def unmerge(self) -> None:
        """Put the factors back."""
        if not self._factors:
            super().unmerge()  # which says that there is nothing to undo
            return
        self.merged_adapters.clear()
        self._put_back()

    def _put_back(self) -> None:
        weight = self.base_layer.weight
        self.base_layer = self._factors[0].to(weight.device, weight.dtype)
        self._factors = ()


class LoraModel(_lora.LoraModel):  # type: ignore[misc]
    """PEFT's LoRA, also on factorised layers."""

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **options: Any
    ) -> None:
        """Put an adapter on its layers; ``"all-linear"`` means factorised ones too."""
        include_all_linear(self.peft_config[adapter_name], model)
        super().inject_adapter(model, adapter_name, *args, **options)

    @staticmethod
    def _create_new_module(config: Any, adapter_name: str, target: Any, **options: Any) -> Any:
        if is_factorised(target):
            return LoraFactorisedLinear(target, adapter_name, config, **options)
        return _lora.LoraModel._create_new_module(config, adapter_name, target, **options)

    def _unload_and_optionally_merge(self, *args: Any, **options: Any) -> Any:
        found = super()._unload_and_optionally_merge(*args, **options)
        record_factorised(found)
        return found


_mapping.PEFT_TYPE_TO_TUNER_MAPPING[_types.PeftType.LORA] = LoraModel
