"""RandLoRA's tuner: PEFT's, with the bases of each adapter held once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fullrank.adapters.randlora_bases import Bases, Recipe
from fullrank.adapters.randlora_layer import RandLoraLinear
from fullrank.adapters.tuner import TunerModel
from fullrank.core.errors import InputError
from fullrank.core.names import canonical_name

_BASES = "base_model.randlora_bases."


class RandLoraModel(TunerModel):
    """What ``get_peft_model`` makes from a :class:`~fullrank.adapters.RandLoraConfig`.

    Adapters are independent: each has its own rank, key, kind of bases and targets.
    """

    prefix = "randlora_"
    tuner_layer_cls = RandLoraLinear
    title = "RandLoRA"
    rank_title = "basis rank"
    # Layers without the model would lose their bases: PEFT then refuses in-place injection.
    uses_shared_state = True

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter into its layers, and draw its bases."""
        config = self.peft_config[adapter_name]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        layers = [layer for _, layer in self.adapted(adapter_name)]
        recipe = Recipe.of((x.shape for x in layers), config.r, config.bases, config.projection_key)
        if not hasattr(self, "randlora_bases"):
            self.randlora_bases = nn.ModuleDict()
        dtype, stored = getattr(torch, config.basis_dtype), config.save_projection == "once"
        others: Any = self.randlora_bases.values()
        twins = (x for x in others if x.given is None and (x.recipe, x.dtype) == (recipe, dtype))
        bases = Bases(recipe, stored, dtype, like=next(twins, None))
        device = layers[0].get_base_layer().weight.device
        self.randlora_bases[adapter_name] = bases if device.type == "meta" else bases.to(device)
        for layer in layers:
            layer.bases[adapter_name] = bases

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter and its bases."""
        super().delete_adapter(adapter_name)
        del self.randlora_bases[adapter_name]

    def delta_rank(self, adapter_name: str = "default") -> dict[str, int]:
        """Return the numerical rank of each layer's update: min(out, in) once it is trained.

        Returns
        -------
        dict
            Name of a module of the base model -> rank; 0 before the first step.
        """
        return {
            canonical_name(name): int(
                torch.linalg.matrix_rank(layer.get_delta_weight(adapter_name))
            )
            for name, layer in self.adapted(adapter_name)
        }

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's files hold the bases in every layer, all the same: take one of each."""
        state_dict = dict(state_dict)
        for name in ("A", "B"):
            copies = [key for key in state_dict if key.endswith(f".randlora_{name}")]
            for key in copies:
                state_dict[f"{_BASES}{name}"] = state_dict.pop(key)
        if not any(key.startswith(_BASES) for key in state_dict):
            raise InputError(
                "the file holds neither bases nor their checksum, so that they cannot be told "
                "from others: save the adapter with its projections (PEFT: save_projection=True)"
            )
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        # PEFT knows the keys that a state holds; bases beside a lone checksum are none of them.
        return {
            key.replace(_BASES, f"{_BASES}{adapter_name}.")
            if key.removeprefix(_BASES) in ("A", "B", "checksum")
            else key: value
            for key, value in found.items()
        }
