"""`RankPlan`: how much rank each weight matrix gets, and why."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fullrank.core.errors import InputError, PlanError
from fullrank.core.files import atomic_write
from fullrank.core.plan_entry import PlanEntry as PlanEntry
from fullrank.core.plan_entry import Purpose as Purpose
from fullrank.core.plan_entry import break_even as break_even

if TYPE_CHECKING:
    from torch import nn

Source = Literal["weight", "activation", "gradient"]

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Savings:
    """What a plan costs against the dense alternative, in numbers (not bytes)."""

    dense: int
    planned: int

    @property
    def kept(self) -> float:
        """Share that is still needed; 0.6 saves 40 %."""
        return self.planned / self.dense if self.dense else 1.0


class RankPlan(Mapping[str, PlanEntry]):
    """An immutable mapping from canonical module names to what each weight matrix gets.

    Spectra are computed once, when the plan is made; it is applied later, saved, compared and
    edited. Names are those of the unwrapped base model (see
    :func:`~fullrank.core.canonical_name`).

    Parameters
    ----------
    entries
        Module name -> :class:`PlanEntry`.
    purpose
        What the ranks are for: ``"factor"`` (replace the matrix by two thin ones),
        ``"optimizer"`` (moments in a subspace) or ``"adapter"`` (a low-rank update).
    source
        What was measured: ``"weight"``, ``"activation"`` or ``"gradient"``.
    fingerprint
        :func:`~fullrank.core.model_fingerprint` of the model it was made on; empty for a plan
        written by hand, which is then checked by names and shapes alone.

    Examples
    --------
    >>> plan = RankPlan({"fc": PlanEntry((8, 32), 4, reason="90 % of the energy")})
    >>> plan.savings().kept
    0.625
    >>> plan.scale(0.5)["fc"].rank
    2
    >>> RankPlan.from_json(plan.to_json()) == plan
    True
    """

    def __init__(
        self,
        entries: Mapping[str, PlanEntry],
        *,
        purpose: Purpose = "factor",
        source: Source = "weight",
        fingerprint: str = "",
    ) -> None:
        if purpose not in get_args(Purpose):
            raise PlanError(f"purpose {purpose!r}; it is one of {get_args(Purpose)}")
        if source not in get_args(Source):
            raise PlanError(f"source {source!r}; it is one of {get_args(Source)}")
        self._entries = dict(entries)
        self.purpose: Purpose = purpose
        self.source: Source = source
        self.fingerprint = fingerprint

    # -- a mapping -------------------------------------------------------------------------

    def __getitem__(self, name: str) -> PlanEntry:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RankPlan):
            return NotImplemented
        return self._as_dict() == other._as_dict()

    def __hash__(self) -> int:
        # Equal plans may list their entries in different orders.
        return hash(json.dumps(self._as_dict(), sort_keys=True))

    def __repr__(self) -> str:
        planned = sum(entry.rank is not None for entry in self.values())
        return (
            f"RankPlan({planned} of {len(self)} matrices, purpose={self.purpose!r}, "
            f"source={self.source!r}, keeps {self.savings().kept:.1%})"
        )

    def __str__(self) -> str:
        width = max((len(name) for name in self), default=6)
        lines = [repr(self)]
        for name, e in self.items():
            rank = "dense" if e.rank is None else str(e.rank)
            shape = f"{e.shape[0]} x {e.shape[1]}"
            lines.append(f"  {name:<{width}}  {shape:>13}  {rank:>6}  {e.reason}".rstrip())
        return "\n".join(lines)

    # -- what it is worth ------------------------------------------------------------------

    def savings(self, purpose: Purpose | None = None) -> Savings:
        """Count the numbers the plan needs against doing without it.

        For ``"factor"`` the matrices' parameters against ``r (m + n)``; for ``"optimizer"``
        AdamW's two moments against GaLore's ``2 r max(m, n) + r min(m, n)``; for ``"adapter"``
        the trainable numbers of full fine-tuning against ``r (m + n)``.
        """
        use = purpose or self.purpose
        each = 2 if use == "optimizer" else 1
        return Savings(
            dense=each * sum(entry.dense_size for entry in self.values()),
            planned=sum(entry.size(use) for entry in self.values()),
        )

    # -- deriving others -------------------------------------------------------------------

    def _with(self, entries: Mapping[str, PlanEntry]) -> RankPlan:
        return RankPlan(
            entries, purpose=self.purpose, source=self.source, fingerprint=self.fingerprint
        )

    def map(self, change: Callable[[str, PlanEntry], PlanEntry]) -> RankPlan:
        """Return the plan with every entry replaced by ``change(name, entry)``."""
        return self._with({name: change(name, entry) for name, entry in self.items()})

    def scale(self, factor: float) -> RankPlan:
        """Multiply every rank, round, and clip to ``[1, min(m, n)]``; for factors to break-even.

        A matrix too small for any factorisation to save (break-even 0) is left alone.
        """
        if not 0 < factor < math.inf:
            raise InputError(f"a plan is scaled by a positive, finite factor, not {factor}")

        def scaled(_: str, entry: PlanEntry) -> PlanEntry:
            if entry.rank is None:
                return entry
            top = min(entry.matrix_shape)
            if self.purpose == "factor":
                top = min(top, entry.break_even)
            rank = min(max(1, round(entry.rank * factor)), top) or None
            return replace(entry, rank=rank)

        return self.map(scaled)

    def merge(self, other: RankPlan, prefer: Literal["self", "other"] | None = None) -> RankPlan:
        """Union of two plans of one purpose and model.

        Raises
        ------
        PlanError
            When the plans differ in purpose or model, or name a matrix differently and
            ``prefer`` does not say whose entry wins.
        """
        if self.purpose != other.purpose:
            raise PlanError(f"cannot merge plans for {self.purpose!r} and {other.purpose!r}")
        if self.fingerprint and other.fingerprint and self.fingerprint != other.fingerprint:
            raise PlanError(
                f"cannot merge plans of models {self.fingerprint} and {other.fingerprint}"
            )
        if prefer not in (None, "self", "other"):
            raise InputError(f"prefer={prefer!r}; it is 'self', 'other' or None")
        conflicts = [n for n in self if n in other and self[n] != other[n]]
        if conflicts and prefer is None:
            raise PlanError(
                f"{len(conflicts)} matrices differ between the plans, e.g. {conflicts[0]!r}; "
                "say prefer='self' or prefer='other'"
            )
        first, second = (other, self) if prefer == "self" else (self, other)
        merged = RankPlan(
            {**first, **second},
            purpose=self.purpose,
            source=self.source,
            fingerprint=self.fingerprint or other.fingerprint,
        )
        # Keep this plan's order, whoever wins.
        names = [*self, *(n for n in other if n not in self)]
        return merged._with({name: merged[name] for name in names})

    # -- using it --------------------------------------------------------------------------

    def check(self, model: nn.Module, purpose: Purpose) -> dict[str, nn.Module]:
        """Find the plan's matrices in a model, or say why it is not the plan's model.

        Returns
        -------
        dict
            Canonical name -> module, for the entries that have a rank.

        Raises
        ------
        PlanError
            When the purpose, the model's fingerprint, a name or a shape differs.
        """
        from fullrank.core.names import canonical_modules, model_fingerprint

        if purpose != self.purpose:
            raise PlanError(
                f"this plan's ranks are for {self.purpose!r}, not {purpose!r}; make one for "
                "that purpose, since what is a good rank differs"
            )
        if self.fingerprint and (found := model_fingerprint(model)) != self.fingerprint:
            raise PlanError(
                f"this plan was made on a model with fingerprint {self.fingerprint}; "
                f"the one given has {found}"
            )
        modules = dict(canonical_modules(model))
        targets = {}
        for name, entry in self.items():
            module = modules.get(name)
            if module is None:
                raise PlanError(f"the model has no module {name!r}, which the plan names")
            weight = getattr(module, "weight", None)
            shape = None if weight is None else tuple(weight.shape)
            if shape is not None and type(module).__name__ == "Conv1D":
                shape = shape[::-1]
            # How a convolution is read as a matrix is its scheme's business; the size must agree.
            if (
                shape is None
                or (len(shape) == 2 and shape != entry.shape)
                or math.prod(shape) != entry.dense_size
            ):
                raise PlanError(f"{name}: the plan is for {entry.shape}, the model has {shape}")
            if entry.rank is not None:
                targets[name] = module
        return targets

    # -- JSON ------------------------------------------------------------------------------

    def _as_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "purpose": self.purpose,
            "source": self.source,
            "fingerprint": self.fingerprint,
            "entries": {
                name: {
                    "shape": list(e.shape),
                    "rank": e.rank,
                    "method": e.method,
                    "scheme": e.scheme,
                    "reason": e.reason,
                    "options": dict(e.options),
                }
                for name, e in self.items()
            },
        }

    def to_json(self) -> str:
        """Return the plan as a JSON text that :meth:`from_json` reads back."""
        return json.dumps(self._as_dict(), indent=1)

    @classmethod
    def from_json(cls, text: str) -> RankPlan:
        """Read a plan; raise :class:`PlanError` on anything that is not one."""
        try:
            data = json.loads(text)
            if data["format"] > FORMAT:
                raise PlanError(
                    f"this plan has format {data['format']}; this version reads up to {FORMAT}: "
                    "upgrade fullrank"
                )
            entries = {
                str(name): PlanEntry(**{**entry, "shape": tuple(entry["shape"])})
                for name, entry in data["entries"].items()
            }
            return cls(
                entries,
                purpose=data["purpose"],
                source=data["source"],
                fingerprint=data["fingerprint"],
            )
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            why = f"there is no {error} in it" if isinstance(error, KeyError) else error
            raise PlanError(f"this is not a rank plan: {why}") from error

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, whole or not at all."""
        return atomic_write(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | Path) -> RankPlan:
        """Read a plan from a JSON file."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise PlanError(f"{path} is not a rank plan: {error}") from error
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
