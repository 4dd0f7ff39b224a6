"""The dense weight that a factorised layer stands for, multiplied out when it is computed with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fullrank.core.errors import InputError

# What can be told of a product without computing it.
_ABOUT = {
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("shape", "ndim", "dtype", "device", "layout", "itemsize", "requires_grad", "grad"),
            *("is_cpu", "is_cuda", "is_meta", "is_mps", "is_quantized", "is_sparse"),
        )
    ),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size, Tensor.get_device),
    *(torch.is_floating_point, torch.is_complex, torch.numel),
}
_WRITING = {
    "__set__",
    "__setitem__",
    *(f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")),
    *(f"__i{name}__" for name in ("and", "or", "xor", "lshift", "rshift")),
}


def product_weight(
    multiply: Callable[[], Tensor], shape: Sequence[int], factors: Iterable[Tensor]
) -> Tensor:
    """Return a product of factors as a tensor that is computed at its first use.

    Parameters
    ----------
    multiply
        Computes the product, of this shape.
    shape
        Its shape.
    factors
        Say its type and device, and whether it has a gradient.
    """
    # A compiler leaves out by itself what is computed in vain.
    if torch.compiler.is_compiling():
        return multiply()
    return ProductWeight(multiply, shape, list(factors))


class ProductWeight(Tensor):
    """A tensor whose numbers are computed when they are asked for, and that cannot be written to.

    Models ask layers for their weight's type or device at every forward pass, which must not cost
    more than the factors save; torch's fast paths around whole blocks, which would compute with
    the product in place of the factors, pass a tensor of another class by. Writing is refused,
    since it would be lost.
    """

    # What transformers' initialisation of missing weights looks for: there is nothing to fill.
    _is_hf_initialized = True

    _multiply: Callable[[], Tensor]
    _found: Tensor | None

    @staticmethod
    def __new__(
        cls: Any, multiply: Callable[[], Tensor], shape: Sequence[int], factors: list[Tensor]
    ) -> ProductWeight:
        """Make a tensor without numbers."""
        made: ProductWeight = Tensor._make_wrapper_subclass(
            cls,
            tuple(shape),
            dtype=factors[0].dtype,
            device=factors[0].device,
            requires_grad=torch.is_grad_enabled() and any(f.requires_grad for f in factors),
        )
        made._multiply, made._found = multiply, None
        return made

    def __init__(self, *_: Any) -> None:
        """Nothing is left to do."""

    def product(self) -> Tensor:
        """Return the numbers as a plain tensor, with a gradient if there was one at the access."""
        if self._found is None:
            with torch.set_grad_enabled(self.requires_grad):
                self._found = self._multiply()
        return self._found

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute with the product, unless it is only asked about."""
        kwargs = kwargs or {}
        if func in _ABOUT:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            with torch.no_grad():
                return cls(args[0]._multiply, args[0].shape, [args[0]])
        name = getattr(func, "__name__", "")
        written = args[:1] if name in _WRITING or _in_place(name) else (kwargs.get("out"),)
        if any(isinstance(tensor, cls) for tensor in written):
            raise InputError(
                "the weight of a factorised layer is the product of its factors, and what is "
                "written to it would be lost: change its `first` and `second`, or put its "
                "`to_dense()` in its place"
            )
        args, kwargs = tree_map_only(cls, cls.product, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Compute with the product where torch was told to pass ``__torch_function__`` by."""
        args, kwargs = tree_map_only(cls, cls.product, (args, kwargs or {}))
        return func(*args, **kwargs)


def _in_place(name: str) -> bool:
    """Whether a function of this name works in place: ``add_``, but not ``__add__``."""
    return name.endswith("_") and not name.endswith("__")
