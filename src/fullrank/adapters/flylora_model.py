"""FlyLoRA's tuner: sees the batch's padding, and balances the experts once a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn

from fullrank.adapters.flylora_layer import FlyLoraLinear, Padding
from fullrank.adapters.tuner import TunerModel


class FlyLoraModel(TunerModel):
    """What ``get_peft_model`` makes from a :class:`~fullrank.adapters.FlyLoraConfig`."""

    prefix = "flylora_"
    tuner_layer_cls = FlyLoraLinear
    title = "FlyLoRA"

    def takes_quantised(self, config: Any) -> bool:
        """Yes: the base weight is only multiplied with."""
        return True

    def most(self, config: Any, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the experts that are asked for, and the layer's shorter side."""
        return sum(size for size, _ in config.experts), min(shape)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **options: Any
    ) -> None:
        """Put an adapter on its layers, and let them see which tokens are padding."""
        super().inject_adapter(model, adapter_name, *args, **options)
        if not hasattr(self, "padding"):
            self.padding = Padding()
            self._watch = model.register_forward_pre_hook(self.padding, with_kwargs=True)
        for _, layer in self.adapted(adapter_name):
            layer.padding = self.padding

    def _unload_and_optionally_merge(self, *args: Any, **options: Any) -> Any:
        found = super()._unload_and_optionally_merge(*args, **options)
        self._watch.remove()
        return found

    @torch.no_grad()
    def update_balance(self) -> None:
        """Move each d by the experts' use since the last time; to be called once a step.

        Counts are summed over the processes of ``torch.distributed``, all of which have to call
        this. Not called, d stays as it is, and experts compete without balance.
        """
        active = list(self._counted())
        if not active:
            return
        counts = torch.cat([layer.counts[name] for layer, name in active])
        if distributed.is_initialized():
            distributed.all_reduce(counts)
        parts = torch.split(counts, [layer.r[name] for layer, name in active])
        for (layer, name), part in zip(active, parts, strict=True):
            layer.rebalance(name, part)

    def trainer_callbacks(self) -> list[Any]:
        """Return what a Hugging Face trainer is to call: the balancing."""
        from fullrank.adapters.flylora_callback import FlyLoraCallback

        return [FlyLoraCallback()]

    def _counted(self) -> Iterator[tuple[FlyLoraLinear, str]]:
        for module in self.model.modules():
            if isinstance(module, FlyLoraLinear):
                for name in module.active_adapters:
                    if name in module.counts:
                        yield module, name
