"""The most bytes of tensors that were alive at once: exact, and the same on a busy machine."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
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
