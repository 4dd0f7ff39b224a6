"""The hidden states of a model's blocks, which feature distillation compares."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from fullrank.core.errors import InputError
from fullrank.core.names import canonical_modules

Which = str | Sequence[int] | Sequence[str]

# Where transformers models put what `output_hidden_states=True` asks for, and the mask over it.
_RETURNED = {
    "hidden_states": "attention_mask",
    "encoder_hidden_states": "attention_mask",
    "decoder_hidden_states": "decoder_attention_mask",
}


class State(NamedTuple):
    """The output of one block, and the name of the mask over its tokens in a batch."""

    value: Tensor
    mask: str


class Features:
    """Where a model's blocks put out what, and how to get at it.

    Parameters
    ----------
    model
        A transformers model returns its hidden states itself; in any other model the blocks are
        watched.
    which
        ``"all"`` blocks; the ``"last"``; indices of some; or name patterns of the modules whose
        outputs count, in any model.

    Raises
    ------
    InputError
        When no module is named so, or the model has no row of blocks to find by itself.

    Examples
    --------
    >>> import torch
    >>> blocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    >>> features = Features(nn.Sequential(blocks, nn.Linear(2, 1)), "all")
    >>> output, states = features.run(torch.zeros(3, 2), lambda m, x: m(x))
    >>> [tuple(state.value.shape) for state in states]
    [(3, 2), (3, 2)]
    """

    def __init__(self, model: nn.Module, which: Which = "all") -> None:
        self.model = model
        self._pick: str | Sequence[int] = "all"
        patterns: list[str] = []
        if which in ("all", "last"):
            self._pick = str(which)
        elif isinstance(which, str):
            patterns = [which]
        elif which and all(isinstance(item, int) for item in which):
            self._pick = [int(item) for item in which]
        elif which and all(isinstance(item, str) for item in which):
            patterns = [str(item) for item in which]
        else:
            raise InputError(
                f"hidden_states={which!r}; it is 'all', 'last', indices or name patterns"
            )
        self._returned = not patterns and _is_transformers_model(model)
        self._watched: list[nn.Module] = []
        if patterns:
            self._watched = _named(model, patterns)
        elif not self._returned:
            self._watched = _blocks(model)

    def run(self, batch: Any, call: Callable[[nn.Module, Any], Any]) -> tuple[Any, list[State]]:
        """Run the model; return what it returned, and its blocks' outputs."""
        with self.watching() as seen:
            output = call(self.model, self.asking(batch))
        return output, self.states(output, seen)

    @contextmanager
    def watching(self) -> Iterator[list[Tensor]]:
        """Collect the outputs of the watched blocks meanwhile."""
        seen: list[Tensor] = []

        def hook(_: nn.Module, __: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)

        handles = [module.register_forward_hook(hook) for module in self._watched]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def asking(self, batch: Any) -> Any:
        """Return the batch with a request for hidden states, if the model answers that."""
        if not self._returned:
            return batch
        if not isinstance(batch, Mapping):
            raise InputError(
                "a transformers model is given its batches as mappings (input_ids=..., labels=...)"
                f", not as a {type(batch).__name__}"
            )
        return {**batch, "output_hidden_states": True}

    def states(self, output: Any, seen: Sequence[Tensor]) -> list[State]:
        """Pick the hidden states out of what a model returned, or what was seen meanwhile."""
        if self._returned:
            found = [
                State(value, mask)
                for key, mask in _RETURNED.items()
                # The first is the embeddings: no block's output.
                for value in (_get(output, key) or ())[1:]
            ]
        else:
            found = [State(value, "attention_mask") for value in seen]
        if not found:
            raise InputError(
                f"{type(self.model).__name__} returned no hidden states; pass name patterns of "
                "its blocks as hidden_states="
            )
        if self._pick == "all":
            return found
        picked = [-1] if self._pick == "last" else [int(i) for i in self._pick]
        if not all(-len(found) <= i < len(found) for i in picked):
            raise InputError(f"hidden_states={picked}; the model has {len(found)} blocks")
        return [found[i] for i in picked]


def _get(output: Any, key: str) -> Any:
    return output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)


def _is_transformers_model(model: nn.Module) -> bool:
    inner = getattr(model, "module", model)
    return any(c.__name__ == "PreTrainedModel" for c in type(inner).__mro__)


def _named(model: nn.Module, patterns: Sequence[str]) -> list[nn.Module]:
    names = {name: module for name, module in canonical_modules(model) if name}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"no module is named like {pattern!r}; there are {', '.join(list(names)[:3])}"
                f"{', ...' if len(names) > 3 else ''}"
            )
    return [m for name, m in names.items() if any(fnmatchcase(name, p) for p in patterns)]


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Find the outermost rows of two or more modules of one class."""
    rows: list[list[nn.Module]] = []

    def look(module: nn.Module) -> None:
        children = list(module.children())
        alike = len({type(child) for child in children}) == 1 and len(children) > 1
        if alike and isinstance(module, (nn.ModuleList, nn.Sequential)):
            rows.append(children)
            return
        for child in children:
            look(child)

    look(model)
    if not rows:
        raise InputError(
            "the model has no row of blocks of one class; pass name patterns of the modules whose "
            "outputs are to be distilled as hidden_states="
        )
    return [block for row in rows for block in row]
