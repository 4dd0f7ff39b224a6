"""The optimizers of the leaderboard, and the learning rates that each is tried at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fullrank.bench.sizes import Size
from fullrank.core.errors import InputError

T = TypeVar("T")

BASELINE = "AdamW"
"""Whose loss the others are timed against, and whose state they are compared with."""

HEAD = 4.0
"""Learning rate of the head (embeddings, output layer, norms) over that of the blocks' matrices.

GaLore's scale of 1/4 has this effect, and much of what looks like its gain comes from it; so it is
given to all, and factors on the update inside the optimizers are 1.
"""

GAP = 200
"""Steps between two choices of subspaces or entries, where there are any."""

# Where the middles of the grids are: for Adam on all entries, for other updates whose entries are
# about as large as the rate, and for those that are rate times gradient.
_ADAM, _NORMALISED, _BY_GRADIENT = 1e-3, 3e-3, 0.1


@dataclass(frozen=True)
class Entrant:
    """An optimizer and its settings.

    Attributes
    ----------
    label
        Its name in the table.
    name
        See :func:`~fullrank.training.optimizer_names`.
    centre
        Middle of the grid of the body's learning rates.
    ranked
        Whether it has a rank, which then is the size's.
    options
        Arguments other than the defaults.
    """

    label: str
    name: str
    centre: float = _NORMALISED
    ranked: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def rates(self, count: int) -> tuple[float, ...]:
        """Return learning rates about the centre, two a decade: 1, 3, 10.

        >>> Entrant("AdamW", "adamw", centre=1e-3).rates(3)
        (0.0003, 0.001, 0.003)
        """
        first = round(2 * math.log10(self.centre)) - count // 2
        return tuple(float(f"{10 ** (k / 2):.0e}") for k in range(first, first + count))

    def section(self, lr: float, size: Size) -> dict[str, Any]:
        """Return the optimizer's section of a run's settings."""
        rank = {"rank": size.rank} if self.ranked else {}
        rates = {"lr": lr, "head_lr": HEAD * lr}
        return {"name": self.name, **rates, **rank, "options": dict(self.options)}


_PROJECTED = {"scale": 1.0, "update_proj_gap": GAP}
_FIRA = {"alpha": 1.0, "update_proj_gap": GAP}

ENTRANTS = (
    Entrant(BASELINE, "adamw", centre=_ADAM),
    # Rates as AdamW's, by the factor that makes its updates as large.
    Entrant("Muon", "muon", options={"adjust_lr_fn": "match_rms_adamw"}),
    Entrant("SGD", "sgd", centre=_BY_GRADIENT),
    Entrant("GaLoreAdamW", "galore_adamw", ranked=True, options=_PROJECTED),
    Entrant("GaLoreAdafactor", "galore_adafactor", ranked=True, options=_PROJECTED),
    Entrant("FiraAdamW", "fira_adamw", ranked=True, options=_FIRA),
    Entrant("FiraRMSprop", "fira_rmsprop", ranked=True, options=_FIRA),
    Entrant("FrugalAdamW", "frugal_adamw", options={"density": 0.25, "update_gap": GAP}),
    Entrant("GradNormLoRPAdamW", "gradnormlorp_adamw", ranked=True, options=_PROJECTED),
    Entrant("LIFT", "lift", ranked=True, options={"update_interval": GAP}),
    Entrant("AdamP", "adamp", centre=_ADAM),
    Entrant("SGDP", "sgdp", centre=_BY_GRADIENT),
    Entrant("MKOR", "mkor", centre=_BY_GRADIENT),
    Entrant("MKORH", "mkorh", centre=_BY_GRADIENT),
)
"""All that can train a model from the start. (LoRAPro steps adapters.)"""


def chosen_entrants(labels: Sequence[str] | None) -> tuple[Entrant, ...]:
    """Return the entrants of these names, in the table's order; all by default.

    Raises
    ------
    InputError
        For a name that no entrant has.

    Examples
    --------
    >>> [entrant.label for entrant in chosen_entrants(["MKOR", "AdamW"])]
    ['AdamW', 'MKOR']
    """
    return chosen_by_name(labels, ENTRANTS, lambda entrant: entrant.label, "optimizer")


def chosen_by_name(
    names: Sequence[str] | None, contestants: Sequence[T], name_of: Callable[[T], str], what: str
) -> tuple[T, ...]:
    """Return the contestants of these names, in their own order; all where none is named.

    Raises
    ------
    InputError
        For a name that none has; ``what`` says what it should have named.
    """
    by_name = {name_of(contestant).lower(): contestant for contestant in contestants}
    for name in names or ():
        if name.lower() not in by_name:
            there = ", ".join(map(name_of, contestants))
            raise InputError(f"no {what} {name!r} to compare; there are {there}")
    wanted = {name.lower() for name in names or by_name}
    return tuple(contestant for name, contestant in by_name.items() if name in wanted)
