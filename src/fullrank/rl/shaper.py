"""VERL's advantage shaping: a bounded bonus for responses whose hidden states explore.

Each response has an effective rank (ER) of its hidden states, the rank's velocity along the
tokens (ERV) and its acceleration (ERA); see :func:`~fullrank.spectra.rank_dynamics`. Compared
with running means they say whether a response explores or exploits more than usual, and a bonus
that never flips a sign is added to its advantage (arXiv 2509.23808).
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from fullrank.core.errors import InputError

Mode = Literal["adaptive", "half", "both", "PlanB", "FixTwo", "FixOne"]
BonusOn = Literal["sequence", "last_token"]
Ema = Literal["first_batch", "official"]

# What the official code calls them.
_MODES: dict[str, Mode] = {"PlanB": "adaptive", "FixTwo": "half", "FixOne": "both"}
_EMA = 0.3
_TINY = 1e-8
# Relative deviations are cut off here (official code).
_LARGEST = 5.0


class Baselines(NamedTuple):
    """Running means of the three measures."""

    er: Tensor
    erv: Tensor
    era: Tensor


class RankShaper:
    """Adds the bonus, and keeps the running means it is measured against.

    In a step call :meth:`shape`, then :meth:`update` with the same measures.

    Parameters
    ----------
    gain
        g: how sharply acceleration decides between exploring and exploiting; 2.
    kappa
        The bonus is at most ``|A| / kappa``; 2. Above 1 no sign flips.
    ema
        alpha: weight of the newest batch in the running means; 0.3. ``"official"`` is 0.3 with
        ``start="official"``.
    aux_weight
        Of the bonus; 1. 0 leaves advantages as they are, bit for bit.
    dynamic
        Let the weight fall as scores in [-1, 1] rise: ``aux_weight (1 - (S + 1) / 2)`` with a
        running mean S that starts at 0.
    mode
        ``"adaptive"``: ``beta = sigmoid(g z_ERA)`` weighs ER (exploring) and ``1 - beta`` ERV
        (exploiting). ``"half"``: beta is 0.5. ``"both"``: both count in full. The official code's
        names ``"PlanB"``, ``"FixTwo"`` and ``"FixOne"`` are known too.
    bonus_on
        ``"sequence"``: every token of a response (the paper's formula); ``"last_token"``: its
        last one (official code).
    start
        ``"first_batch"``: means begin with those of the first batch and are up to date;
        ``"official"``: they begin at 0 and lag a step behind.

    Raises
    ------
    InputError
        On values out of range.

    Examples
    --------
    >>> shaper = RankShaper()
    >>> er, erv, era = torch.tensor([4.0, 8.0]), torch.tensor([0.1, 0.3]), torch.tensor([0.0, 0.1])
    >>> advantages = torch.tensor([-1.0, 1.0])
    >>> shaper.shape(advantages, er, erv, era)     # nothing to compare with yet
    tensor([-1.,  1.])
    >>> shaper.update(er, erv, era)
    >>> shaper.shape(advantages, er, erv, era)
    tensor([-1.0000,  1.3383])
    """

    def __init__(
        self,
        gain: float = 2.0,
        kappa: float = 2.0,
        ema: float | Literal["official"] = _EMA,
        aux_weight: float = 1.0,
        *,
        dynamic: bool = False,
        mode: Mode = "adaptive",
        bonus_on: BonusOn = "sequence",
        start: Ema = "first_batch",
    ) -> None:
        if ema == "official":
            ema, start = _EMA, "official"
        mode = _MODES.get(mode, mode)
        if isinstance(ema, str) or not (kappa > 0 and 0 < ema <= 1 and aux_weight >= 0):
            raise InputError(
                f"kappa={kappa}, ema={ema}, aux_weight={aux_weight}; expected kappa > 0, "
                "0 < ema <= 1 and aux_weight >= 0"
            )
        for name, value, known in (
            ("mode", mode, ("adaptive", "half", "both")),
            ("bonus_on", bonus_on, ("sequence", "last_token")),
            ("start", start, ("first_batch", "official")),
        ):
            if value not in known:
                raise InputError(f"{name}={value!r}; it is one of {', '.join(known)}")
        self.gain, self.kappa, self.ema, self.aux_weight = gain, kappa, ema, aux_weight
        self.dynamic, self.mode, self.bonus_on, self.start = dynamic, mode, bonus_on, start
        self.last_stats: dict[str, Tensor] = {}
        self._means: Tensor | None = None
        self._pending: Tensor | None = None
        self._score = torch.zeros((), dtype=torch.float64)
        self._steps = 0

    @property
    def baselines(self) -> Baselines | None:
        """The running means that the next step is measured against; None before there are any."""
        return None if self._means is None else Baselines(*self._means)

    def signal(self, er: Tensor, erv: Tensor, era: Tensor) -> tuple[Tensor, Tensor]:
        """Return the auxiliary signal of each response, and its controller beta; both ``(B,)``."""
        measures = _stacked(er, erv, era)
        if self._means is None:
            return torch.zeros_like(measures[0]), torch.full_like(measures[0], 0.5)
        means = self._means.to(measures)[:, None]
        z = ((measures - means) / (means.abs() + _TINY)).clamp(-_LARGEST, _LARGEST)
        beta = torch.sigmoid(self.gain * z[2])
        explore, exploit = beta, 1 - beta
        if self.mode == "half":
            explore = exploit = torch.full_like(beta, 0.5)
        elif self.mode == "both":
            explore = exploit = torch.ones_like(beta)
        weight: Tensor | float = self.aux_weight
        if self.dynamic:
            weight = self.aux_weight * (1 - (self._score.to(z) + 1) / 2)
        signal = weight * (explore * z[0].tanh() + exploit * z[1].tanh())
        self.last_stats = {
            "beta": explore.mean(),
            "signal": signal.mean(),
            "saturated": (z.abs() >= _LARGEST).to(z).mean(),
        }
        return signal, explore

    def shape(
        self,
        adv: Tensor,
        er: Tensor,
        erv: Tensor,
        era: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Add the bonus to advantages.

        Parameters
        ----------
        adv
            ``(B,)`` advantages, or ``(B, T)`` one a token.
        er, erv, era
            ``(B,)`` measures of the responses.
        mask
            ``(B, T)``, True on a response's tokens. Needed for advantages a token, and for
            ``bonus_on="last_token"``.

        Returns
        -------
        Tensor
            Of the advantages' shape; with a mask ``(B, T)``, 0 outside of it. Where the advantage
            is 0, and in a response without tokens, it stays 0.
        """
        adv, er = torch.as_tensor(adv), torch.as_tensor(er)
        if adv.shape[0] != er.shape[0]:
            raise InputError(f"{adv.shape[0]} advantages for {er.shape[0]} responses; one each")
        if mask is None and (adv.ndim > 1 or self.bonus_on == "last_token"):
            raise InputError("one advantage a token needs mask=, True on each response's tokens")
        if self.aux_weight == 0:
            return adv
        signal, _ = self.signal(er, erv, era)
        signal = signal.clamp_min(0).to(adv)
        by_token = adv
        if mask is not None:
            by_token = adv if adv.ndim > 1 else adv[:, None] * mask
            where = _last(mask) if self.bonus_on == "last_token" else mask.bool()
            signal = signal[:, None] * where
        bonus = torch.minimum(signal, by_token.abs() / self.kappa)
        self.last_stats["rewarded"] = (bonus > 0).to(bonus).mean()
        return by_token + bonus

    def update(self, er: Tensor, erv: Tensor, era: Tensor, scores: Tensor | None = None) -> None:
        """Take in a batch's measures (of all processes), and its task scores in [-1, 1]."""
        new = _stacked(er, erv, era).double().mean(1).cpu()
        self._steps += 1
        if self.start == "official":
            before = torch.zeros_like(new) if self._means is None else self._means
            # The official code folds a batch in only when the next one comes.
            if self._pending is not None:
                before = self._mixed(before, self._pending)
            self._means, self._pending = before, new
        else:
            self._means = new if self._means is None else self._mixed(self._means, new)
        # The official code shapes nothing in the first step, and leaves its scores out as well.
        if scores is not None and (self.start == "first_batch" or self._steps > 1):
            # A reward function may have had nothing to say.
            known = scores[scores.isfinite()].double()
            if len(known):
                self._score = self._mixed(self._score, known.mean().cpu())

    def _mixed(self, old: Tensor, new: Tensor) -> Tensor:
        return (1 - self.ema) * old + self.ema * new

    def state_dict(self) -> dict[str, Any]:
        """Return plain numbers and lists of them, which JSON keeps to the last bit."""
        return {
            "means": _values(self._means),
            "pending": _values(self._pending),
            "score": float(self._score),
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self._means, self._pending = _tensor(state["means"]), _tensor(state["pending"])
        self._score = torch.tensor(state["score"], dtype=torch.float64)
        self._steps = int(state["steps"])


def _values(tensor: Tensor | None) -> list[float] | None:
    return None if tensor is None else tensor.tolist()


def _tensor(values: list[float] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.float64)


def _stacked(er: Tensor, erv: Tensor, era: Tensor) -> Tensor:
    """``(3, B)`` in at least float32."""
    er, erv, era = (torch.as_tensor(measure) for measure in (er, erv, era))
    if not er.ndim == erv.ndim == era.ndim == 1 or not len(er) == len(erv) == len(era) > 0:
        raise InputError(
            f"measures of shapes {tuple(er.shape)}, {tuple(erv.shape)} and {tuple(era.shape)}; "
            "expected one number a response in each"
        )
    stacked = torch.stack([er, erv, era])
    return stacked.to(torch.promote_types(stacked.dtype, torch.float32))


def _last(mask: Tensor) -> Tensor:
    """True at the last token of each response."""
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask.bool(), places, -1).amax(1, keepdim=True)
    return (places == last) & mask.bool()
