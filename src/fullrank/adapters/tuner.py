"""What our tuners share as models of PEFT: which layers they go on, and which files fit them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor, nn

from fullrank.adapters.bases import (
    include_all_linear,
    is_factorised,
    is_linear,
    record_factorised,
    shape_of,
)
from fullrank.adapters.tuner_layer import TunerLayer
from fullrank.core.errors import InputError, require
from fullrank.core.names import canonical_name

_tuners: Any = require("peft.tuners.tuners_utils", extra="adapters")
_constants: Any = require("peft.utils.constants", extra="adapters")


class TunerModel(_tuners.BaseTuner):  # type: ignore[misc]
    """Base of what ``get_peft_model`` makes: a tuner names its layer, prefix and title.

    Attributes
    ----------
    prefix
        What the names of the layers' tensors begin with.
    tuner_layer_cls
        Its :class:`~fullrank.adapters.tuner_layer.TunerLayer`.
    title
        Of the method, in messages.
    rank_title
        What the method calls the rank that a layer's shorter side limits.
    """

    prefix: str
    tuner_layer_cls: Any
    title: ClassVar[str]
    rank_title: ClassVar[str] = "rank"
    target_module_mapping = _constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **options: Any
    ) -> None:
        """Put an adapter on its layers, after a look at whether it can be put on all of them.

        Raises
        ------
        InputError
            Naming the layer; nothing is changed then.
        """
        self._check_targets(model, self.peft_config[adapter_name])
        super().inject_adapter(model, adapter_name, *args, **options)

    def takes_quantised(self, config: Any) -> bool:
        """Whether base weights may be packed integers: by default not."""
        return False

    def takes_factorised(self, config: Any) -> bool:
        """Whether base layers may be factors: by default they may, since they run as any other."""
        return True

    def most(self, config: Any, shape: tuple[int, int]) -> tuple[int, int]:
        """Return the rank that is asked of a layer ``(out, in)``, and the largest it allows."""
        return config.r, min(shape)

    def adapted(self, adapter_name: str) -> Iterator[tuple[str, Any]]:
        """Yield the name and the tuner's layer of each module that an adapter is on."""
        for name, module in self.model.named_modules():
            if isinstance(module, self.tuner_layer_cls) and adapter_name in module.r:
                yield name, module

    def _check_targets(self, model: nn.Module, config: Any) -> None:
        """Raise before anything is changed on layers that the adapter cannot be put on."""
        config = self._prepare_adapter_config(config, self.get_model_config(model))
        include_all_linear(config, model)
        wrapped = [n for n, m in model.named_modules() if isinstance(m, _tuners.BaseTunerLayer)]
        for name, module in model.named_modules():
            inside = any(name.startswith(f"{outer}.") for outer in wrapped)
            if inside or not self._check_target_module_exists(config, name):
                continue
            if isinstance(module, _tuners.BaseTunerLayer):
                module = module.get_base_layer()
            self._check_layer(canonical_name(name), module, config.at(name))

    def _check_layer(self, name: str, module: Any, config: Any) -> None:
        weight = getattr(module, "weight", None)
        if is_factorised(module) and not self.takes_factorised(config):
            raise InputError(
                f"{name} is factorised, and {self.title} starts from its weight's gradient: put "
                "it on the dense model, or leave the layer out of target_modules"
            )
        linear = is_linear(module)
        packed = weight is None or not weight.is_floating_point()
        if not linear or (packed and not self.takes_quantised(config)):
            raise InputError(
                f"{name} is a {type(module).__name__}: {self.title} is for linear layers "
                "(nn.Linear, Conv1D) whose weights are not quantised; leave it out of "
                "target_modules"
            )
        shape = shape_of(module)
        asked, most = self.most(config, shape)
        if asked > most:
            raise InputError(
                f"{name} is {' x '.join(map(str, shape))}: a {self.rank_title} of {asked} is above "
                f"{most}; give a smaller one, or leave the layer out of target_modules"
            )

    def _create_and_replace(
        self,
        config: Any,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **options: Any,
    ) -> None:
        config = config.at(current_key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, config)
            return
        layer = self.tuner_layer_cls(target, adapter_name, config)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        if is_factorised(new_module):
            # PEFT would hand a weight over to it.
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **options: Any) -> Any:
        found = super()._unload_and_optionally_merge(*args, **options)
        record_factorised(found)
        return found

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Nothing: each layer keeps its tensors in the type that the method asks for."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Name a file's tensors as the model does, and raise where they are for another base.

        PEFT leaves out what does not fit a name, and fails inside torch on another shape.
        """
        found: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        remedy = "load it on the base model it was trained on, with the layers it was trained with"
        expected = dict(_tensors(model, adapter_name))
        for key, tensor in expected.items():
            if key not in found:
                raise InputError(f"the file holds nothing for {_layer(key)}; {remedy}")
            if found[key].shape != tensor.shape:
                there, here = tuple(found[key].shape), tuple(tensor.shape)
                raise InputError(
                    f"the file's tensor for {_layer(key)} is {there}, not {here}; {remedy}"
                )
        names = {held.name for held in cls.tuner_layer_cls.held}
        for key in found:
            if key not in expected and key.rpartition(".")[2] in names:
                raise InputError(f"the file is also for {_layer(f'{key}.')}, not here; {remedy}")
        return found


def _tensors(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Tensor]]:
    """Key and tensor of all that a file holds of an adapter's layers."""
    for name, layer in model.named_modules():
        if isinstance(layer, TunerLayer) and adapter_name in layer.r:
            name = name.replace("_fsdp_wrapped_module.", "")  # as in states
            for held in layer.held:
                entries = getattr(layer, held.name)
                if adapter_name in entries and (held.trained or held.saved):
                    yield f"{name}.{held.name}.{adapter_name}", entries[adapter_name]


def _layer(key: str) -> str:
    """The module that a tensor's key names: without the tensor's and the adapter's name."""
    return canonical_name(key.rsplit(".", 2)[0])
