"""Forward hooks that feed what flows through chosen modules to a function."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def capture(
    modules: Mapping[str, nn.Module],
    consume: Callable[[str, Tensor], None],
    side: Literal["input", "output"] = "input",
) -> Iterator[None]:
    """Call ``consume(name, tensor)`` for every forward pass through the given modules.

    Parameters
    ----------
    modules
        Name -> module to watch.
    consume
        Receives the name and the module's first input or its (first) output, detached; of a
        tuple or a mapping, such as transformers' outputs are, the first of it. Is not called for
        what is no tensor. An exception in it stops the forward pass.
    side
        ``"input"`` or ``"output"``.

    Examples
    --------
    >>> import torch
    >>> layer, seen = torch.nn.Linear(3, 2), []
    >>> with capture({"fc": layer}, lambda name, x: seen.append((name, tuple(x.shape)))):
    ...     _ = layer(torch.zeros(5, 3))
    >>> seen
    [('fc', (5, 3))]
    """

    def hook(name: str) -> Callable[..., None]:
        def run(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            value = output if side == "output" else next(iter((*args, *named.values())))
            tensor = _first_tensor(value)
            if tensor is not None:
                consume(name, tensor)

        return run

    handles = [
        module.register_forward_hook(hook(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(value: Any) -> Tensor | None:
    from torch import Tensor

    while isinstance(value, (Mapping, tuple, list)) and value:
        value = next(iter(value.values() if isinstance(value, Mapping) else value))
    return value.detach() if isinstance(value, Tensor) else None
