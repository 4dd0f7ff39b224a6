"""The most bytes of tensors that were alive at once: exact, and the same on a busy machine."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Census(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that are alive, at every operation inside the context.

    What libraries work in without a tensor of torch's is not seen.

    Parameters
    ----------
    tensors
        Those that exist already and count.

    Attributes
    ----------
    alive, most
        Bytes now, and the most so far.

    Examples
    --------
    >>> import torch
    >>> with Census() as census:
    ...     x = torch.zeros(1000)
    ...     y = x + 1
    ...     del x
    >>> census.alive, census.most
    (4000, 8000)
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known = WeakIdKeyDictionary()
        self.alive = self.most = 0
        for tensor in tensors:
            self._see(tensor)

    def restart(self) -> None:
        """Take the most from here on."""
        self.most = self.alive

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do the operation, then look at what it made."""
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return found

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = size
        weakref.finalize(storage, self._gone, size)
        self.alive += size
        self.most = max(self.most, self.alive)

    def _gone(self, size: int) -> None:
        self.alive -= size


class Peak:
    """The most memory of some work on a device: counted on a CPU, torch's own count on a GPU.

    To be made before what works there; what was left on a GPU earlier does not count.
    """

    def __init__(self) -> None:
        gc.collect()
        self._before = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0

    def of(self, work: Callable[[], Any], model: nn.Module) -> int:
        """Do the work, which runs a model; return the most bytes that were alive in it."""
        if next(model.parameters()).device.type == "cpu":
            census = Census([*model.parameters(), *model.buffers()])
            with census:
                work()
            return census.most
        torch.cuda.reset_peak_memory_stats()
        work()
        return int(torch.cuda.max_memory_allocated()) - self._before
