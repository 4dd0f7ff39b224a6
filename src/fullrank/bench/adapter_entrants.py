"""The adapters of the comparison: all that `adapt` knows, LoRA-Pro, and no adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fullrank.adapters.adapt_methods import METHODS, Method
from fullrank.bench.adapter_sizes import AdapterSize
from fullrank.bench.entrants import chosen_by_name
from fullrank.training.finetune_config import FULL

# The rank that most methods have by default: what a size's rank stands for.
_USUAL_RANK = 8

# Methods that are meant for an optimizer of their own; all others are stepped by AdamW.
_OPTIMIZERS = {"gradnormlorp": "gradnormlorp_adamw"}


@dataclass(frozen=True)
class Tuning:
    """A way to fine-tune: an adapter and the optimizer that steps it.

    Attributes
    ----------
    name, title
        What it is asked for by, and called in the tables.
    method
        Of :func:`~fullrank.adapters.adapt`, or ``"full"``.
    optimizer
        See :func:`~fullrank.training.optimizer_names`.
    """

    name: str
    title: str
    method: str
    optimizer: str = "adamw"

    def adapter(self, size: AdapterSize) -> dict[str, Any]:
        """Return the adapter's section of a run's settings.

        A method whose rank is usually larger than others' has one larger by as much.
        """
        if self.method == FULL:
            return {"method": FULL}
        rank = METHODS[self.method].rank * size.rank // _USUAL_RANK
        return {"method": self.method, "rank": min(max(1, rank), size.most_rank)}

    def stepped(self, lr: float, size: AdapterSize) -> dict[str, Any]:
        """Return the optimizer's section of a run's settings."""
        section: dict[str, Any] = {"name": self.optimizer, "lr": lr}
        if self.optimizer == "gradnormlorp_adamw":
            # A and B have the adapter's rank; half of it is what their gradients are projected to.
            gap = {"update_proj_gap": size.cycle}
            section |= {"rank": max(1, size.rank // 2), "options": gap}
        return section


def tunings(methods: Mapping[str, Method] = METHODS) -> tuple[Tuning, ...]:
    """Return all ways to fine-tune; a method of `adapt` is there by its row.

    >>> [tuning.name for tuning in tunings()][:3]
    ['full', 'lora', 'lora_pro']
    """
    found = [Tuning("full", "full fine-tuning", FULL)]
    for name, method in methods.items():
        found.append(Tuning(name, method.title, name, _OPTIMIZERS.get(name, "adamw")))
        if name == "lora":
            found.append(Tuning("lora_pro", "LoRA-Pro", "lora", "lora_pro"))
    return tuple(found)


def chosen_tunings(names: Sequence[str] | None) -> tuple[Tuning, ...]:
    """Return the ways of these names, in the table's order; all by default.

    Raises
    ------
    InputError
        For a name that there is not.

    Examples
    --------
    >>> [tuning.title for tuning in chosen_tunings(["lora_pro", "eva"])]
    ['LoRA-Pro', 'EVA']
    """
    return chosen_by_name(names, tunings(), lambda tuning: tuning.name, "adapter")
