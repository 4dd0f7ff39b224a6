"""What the layers of our tuners share: several adapters around a linear layer, in PEFT's manner.

A tuner names the tensors that an adapter has (:class:`Held`), makes them, and says what an adapter
adds to the output and to the weight. Which tensors are trained, saved, moved and in what type,
merging and unmerging, and switching adapters on and off is here.
"""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fullrank.adapters.bases import is_factorised, is_transposed, shape_of
from fullrank.adapters.lora_files import LowRank
from fullrank.core.errors import InputError, require

_tuners: Any = require("peft.tuners.tuners_utils", extra="adapters")
_buffers: Any = require("peft.tuners._buffer_dict", extra="adapters")


class Held(NamedTuple):
    """A tensor that every adapter of a layer has, under the adapter's name.

    Attributes
    ----------
    name
        Of the layer's attribute, a dictionary; it begins with the tuner's prefix.
    trained
        A parameter; otherwise a buffer, which optimizers, weight decay and gradients leave alone.
    saved
        Whether a buffer is in files.
    """

    name: str
    trained: bool = False
    saved: bool = True


class TunerLayer(nn.Module, _tuners.BaseTunerLayer):  # type: ignore[misc]
    """An ``nn.Linear`` or ``Conv1D``, or factors in its place, with adapters beside it.

    A tuner gives :attr:`held`, :meth:`make` and :meth:`add_update`, and either :meth:`to_lora` or
    :meth:`get_delta_weight`.

    Parameters
    ----------
    base_layer
        The layer, or another tuner's layer around it.
    adapter_name, config
        The first adapter and its configuration, patterns looked up.

    Attributes
    ----------
    held
        What an adapter consists of.
    beside
        Further dictionaries with an entry an adapter, which PEFT neither moves nor saves.
    r, scaling, settings
        Adapter -> its rank, its scaling, its configuration.
    """

    held: ClassVar[tuple[Held, ...]] = ()
    beside: ClassVar[tuple[str, ...]] = ()

    base_layer: Any
    in_features: int
    out_features: int
    fan_in_fan_out: bool
    # PEFT's own, which nn.Module's __getattr__ hides from type checkers.
    active_adapters: list[str]
    get_base_layer: Any
    set_adapter: Any
    _cast_input_dtype: Any
    _get_base_layer_device_and_dtype: Any

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # PEFT trains and freezes the first kind, and deletes both with their adapter.
        cls.adapter_layer_names = tuple(held.name for held in cls.held if held.trained)
        frozen = tuple(held.name for held in cls.held if not held.trained)
        cls.other_param_names = (*frozen, *cls.beside, "r", "scaling", "settings", "dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.scaling: dict[str, float] = {}
        self.settings: dict[str, Any] = {}
        self.dropout = nn.ModuleDict()
        for name, trained, saved in self.held:
            entries = nn.ParameterDict() if trained else _buffers.BufferDict(persistent=saved)
            setattr(self, name, entries)
        for name in self.beside:
            setattr(self, name, {})
        self.merged_adapters: list[str] = []
        self._unmerged: tuple[Tensor, Tensor | None] | None = None
        # In a tuple, lest it is a part of the model.
        self._factors: tuple[nn.Module, ...] = ()
        self.out_features, self.in_features = shape_of(self.get_base_layer())
        self.fan_in_fan_out = is_transposed(self.get_base_layer())
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.out_features, self.in_features

    def sizes(self, config: Any) -> tuple[int, float]:
        """Return an adapter's rank and its scaling: by default alpha / r, 1 without an alpha."""
        return config.r, 1.0 if config.alpha is None else config.alpha / config.r

    def make(self, adapter_name: str, config: Any) -> None:
        """Fill an adapter's entries of :attr:`held`.

        Parameters do not hold numbers under ``low_cpu_mem_usage``: a file's follow. So nothing
        that takes long may be computed for them.
        """
        raise NotImplementedError

    def inputs(self, adapter_name: str, x: Tensor) -> Tensor:
        """Return what an adapter is given of the layer's input: by default after its dropout."""
        dropped: Tensor = self.dropout[adapter_name](x)
        return dropped

    def add_update(self, adapter_name: str, result: Tensor, x: Tensor, base: Tensor) -> Tensor:
        """Return ``result`` with what an adapter adds to the output.

        Parameters
        ----------
        adapter_name
            An active one.
        result
            The output so far, other adapters included.
        x
            ``(..., in)``, in the type of the adapter's tensors.
        base
            The output of the base layer.
        """
        raise NotImplementedError

    def to_lora(self, adapter_name: str) -> LowRank:
        """Return what an adapter adds to the weight ``(out, in)`` as two factors.

        Raises
        ------
        InputError
            When it is not of low rank.
        """
        raise InputError(
            f"the update of a {type(self).__name__} is not of low rank; use merge_and_unload"
        )

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return what merging adds to the weight, in its orientation and at least float32."""
        A, B = self.to_lora(adapter_name)
        wide = torch.promote_types(B.dtype, torch.float32)
        return self.oriented(B.to(wide) @ A.to(wide))

    def get_delta_bias(self, adapter_name: str) -> Tensor | None:
        """Return what merging adds to the bias; nothing by default."""
        return None

    def dtype_of(self, held: Held, adapter_name: str) -> torch.dtype:
        """Return the type that a tensor is kept in: the base's, and at least float32.

        A step of a few thousandths of a number is lost in half precision, and so is the
        orthogonality of frozen factors.
        """
        _, base = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if base is None or not base.is_floating_point:
            return torch.float32
        return torch.promote_types(base, torch.float32)

    def oriented(self, matrix: Tensor) -> Tensor:
        """Turn ``(out, in)`` into the base weight's form, or back: Conv1D holds the transpose."""
        return matrix.T if self.fan_in_fan_out else matrix

    @torch.no_grad()
    def original(self) -> tuple[Tensor, Tensor | None]:
        """Return the base's weight ``(out, in)`` and bias, without what is merged into them."""
        inner = self.get_base_layer()
        weight, bias = self._unmerged or (inner.weight, inner.bias)
        return self.oriented(weight), bias

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter."""
        self.settings[adapter_name] = config
        self.r[adapter_name], self.scaling[adapter_name] = self.sizes(config)
        dropout = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.dropout[adapter_name] = dropout
        self.make(adapter_name, config)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the base layer's output with what the active adapters add."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        base: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return base
        result = base
        for name in self.active_adapters:
            if name in self.r:
                inputs = self.inputs(name, self._cast_input_dtype(x, self._dtype(name)))
                result = self.add_update(name, result, inputs, base)
        return result.to(base.dtype)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the weight, which is kept aside until :meth:`unmerge`.

        Factors are kept aside too, with the dense layer in their place.

        Parameters
        ----------
        safe_merge
            Raise where the result is not finite.
        adapter_names
            Which ones; the active ones by default.

        Raises
        ------
        InputError
            When the base is quantised, or the result is not finite; the layer is as it was.
        """
        inner = self.get_base_layer()
        for name in _tuners.check_adapters_to_merge(self, adapter_names):
            if name not in self.r:
                continue
            if not inner.weight.is_floating_point():
                raise InputError(
                    f"the base weight is quantised ({inner.weight.dtype}); load the model without "
                    "quantisation to merge into it"
                )
            weight = _sum(inner.weight, self.get_delta_weight(name))
            bias, shift = inner.bias, self.get_delta_bias(name)
            if shift is not None:
                bias = shift.to(weight) if bias is None else _sum(bias, shift)
            parts = [part for part in (weight, bias) if part is not None]
            if safe_merge and not all(part.isfinite().all() for part in parts):
                raise InputError(
                    f"merging adapter {name!r} gives weights that are not finite; its numbers are"
                    " broken, or too large for the base's type"
                )
            if is_factorised(inner):
                self._factors = (inner,)
                inner = inner.to_dense()
                self._put_base(inner)
            if self._unmerged is None:
                self._unmerged = (
                    inner.weight.data,
                    None if inner.bias is None else inner.bias.data,
                )
            inner.weight.data = weight
            _set_bias(inner, bias)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Put the weight back as it was, to the bit."""
        if self._unmerged is None:
            warnings.warn("nothing is merged; there is nothing to undo", stacklevel=2)
            return
        inner = self.get_base_layer()
        weight, bias = self._unmerged
        if self._factors:
            self._put_base(self._factors[0].to(inner.weight.device, inner.weight.dtype))
            self._factors = ()
        else:
            inner.weight.data = weight.to(inner.weight)
            _set_bias(inner, None if bias is None else bias.to(inner.weight))
        self._unmerged = None
        self.merged_adapters.clear()

    def _put_base(self, layer: nn.Module) -> None:
        holder: Any = self
        while isinstance(holder.base_layer, _tuners.BaseTunerLayer):
            holder = holder.base_layer
        holder.base_layer = layer

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT may decompose an adapter's update into a LoRA: it adds to the weight."""
        return True

    def _dtype(self, adapter_name: str) -> torch.dtype:
        found: torch.dtype = next(
            getattr(self, held.name)[adapter_name].dtype
            for held in self.held
            if held.trained and adapter_name in getattr(self, held.name)
        )
        return found

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        """Move an adapter; PEFT's way would round frozen tensors to the base's type."""
        found, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        target = device or found
        for held in self.held:
            entries = getattr(self, held.name)
            if target is None or adapter_name not in entries or entries[adapter_name].is_meta:
                continue
            tensor = entries[adapter_name]
            dtype = self.dtype_of(held, adapter_name) if tensor.is_floating_point() else None
            if held.trained:
                # In place: an optimizer may hold it already.
                tensor.data = tensor.data.to(target, dtype)
            else:
                entries[adapter_name] = tensor.to(target, dtype)


def _sum(tensor: Tensor, update: Tensor) -> Tensor:
    """``tensor + update``, rounded once to the tensor's type."""
    return (tensor + update.to(tensor.device)).to(tensor.dtype)


def _set_bias(layer: Any, bias: Tensor | None) -> None:
    if bias is None or layer.bias is None:
        # For files: an architecture without this bias would not load it.
        layer.bias_added = bias is not None
        layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    else:
        layer.bias.data = bias
