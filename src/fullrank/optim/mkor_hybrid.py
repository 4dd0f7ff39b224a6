"""MKOR-H: MKOR while its steps pay, then the inner optimizer alone (arXiv 2306.01685)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError
from fullrank.optim import checks as valid
from fullrank.optim.mkor import MKOR
from fullrank.optim.mkor_reduce import mean_of
from fullrank.optim.mkor_settings import Inner

_SMOOTHING = 0.9


class KneePoint:
    """Says when the loss has stopped falling faster than a part of its average rate.

    With the losses ``l_0, l_1, ...``, ``r_t`` is the exponential average (factor 0.9) of
    ``l_{t-1} - l_t``, started at the first difference. The knee is there once
    ``r_t < beta (l_0 - l_t) / t`` held ``patience`` times in a row.

    Parameters
    ----------
    beta
        Part of the average rate: 0.1.
    patience
        Checks in a row: 30.

    Examples
    --------
    >>> knee = KneePoint(patience=3)
    >>> [knee.observe(loss) for loss in (4.0, 2.0, 1.0, *[1.0] * 90)].index(True)
    61
    """

    def __init__(self, beta: float = 0.1, patience: int = 30) -> None:
        self.beta, self.patience = beta, patience
        self.restart()

    def restart(self) -> None:
        """Forget all losses."""
        self.first = self.last = self.rate = math.nan
        self.count = self.below = 0

    def observe(self, loss: float) -> bool:
        """Take in a loss; True when the knee is reached. A loss that is not finite is left out."""
        if not math.isfinite(loss):
            return False
        if self.count == 0:
            self.first = loss
        else:
            fall = self.last - loss
            old = fall if self.count == 1 else self.rate
            self.rate = _SMOOTHING * old + (1.0 - _SMOOTHING) * fall
            slow = self.rate < self.beta * (self.first - loss) / self.count
            self.below = self.below + 1 if slow else 0
        self.last = loss
        self.count += 1
        return self.below >= self.patience

    def state(self) -> dict[str, float]:
        """Plain numbers."""
        return {k: getattr(self, k) for k in ("first", "last", "rate", "count", "below")}

    def load(self, state: dict[str, float]) -> None:
        """Continue from saved numbers."""
        for key in ("first", "last", "rate"):
            setattr(self, key, float(state[key]))
        self.count, self.below = int(state["count"]), int(state["below"])


class MKORH(MKOR):
    """MKOR that leaves the work to its inner optimizer once second-order steps stop paying.

    Give it the training loss at every step, as ``step(loss=loss)``, by a closure, or with
    :meth:`observe`. The paper switches when the loss falls too slowly but gives no formula; the
    one here (:class:`KneePoint`) follows the knee-point rule of its learning-rate schedule. On the
    switch the hooks are taken off and the factors freed: every step is then the inner optimizer's.

    Parameters
    ----------
    model, optimizer, **options
        As for :class:`MKOR`.
    switch_beta
        Part of the average rate of decrease below which a step does not pay: 0.1.
    patience
        So many checks in a row: 30, three periods of ten steps.

    Attributes
    ----------
    switched_at
        The step after which MKOR ended, or None.

    Raises
    ------
    InputError
        As :class:`MKOR`.

    Examples
    --------
    >>> model = nn.Linear(4, 1)
    >>> optimizer = MKORH(model, torch.optim.SGD(model.parameters(), lr=0.1), patience=3)
    >>> for _ in range(120):
    ...     optimizer.zero_grad()
    ...     loss = (model(torch.ones(8, 4)) - 1).square().mean()
    ...     loss.backward()
    ...     _ = optimizer.step(loss=loss)
    >>> optimizer.switched_at is not None, optimizer.factor_bytes()
    (True, 0)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Inner = None,
        *args: Any,
        switch_beta: float = 0.1,
        patience: int = 30,
        **options: Any,
    ) -> None:
        valid.at_least(0.0)("switch_beta", switch_beta)
        valid.whole("patience", patience)
        self.knee = KneePoint(switch_beta, patience)
        self.switched_at: int | None = None
        super().__init__(model, optimizer, *args, **options)

    def observe(self, loss: float | Tensor) -> None:
        """Take in the training loss of a step; switch where it is time.

        Reads the loss from its device. Ranks of a process group take the mean of theirs, so all
        of them must call this.

        Parameters
        ----------
        loss
            A number, or a 0-d tensor.
        """
        if self.switched_at is not None:
            return
        device = loss.device if isinstance(loss, Tensor) else torch.device("cpu")
        value = float(loss.item() if isinstance(loss, Tensor) else loss)
        if self.knee.observe(mean_of(value, device, self.process_group)):
            self.switch()

    def switch(self, second_order: bool = False) -> None:
        """Change over now.

        Parameters
        ----------
        second_order
            False: the inner optimizer alone from here on. True: MKOR again, from the identity,
            with a new look at the loss.
        """
        self._hooks.remove()
        for layer in self.layers:
            layer.release()
        self.knee.restart()
        self.switched_at = self.steps
        if second_order:
            self.switched_at = None
            self._hooks.attach(self.layers, self._due)

    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: float | Tensor | None = None,
    ) -> float | None:
        """Take a step, then look at its loss.

        Parameters
        ----------
        closure
            Evaluates the model again and returns the loss, which is observed.
        loss
            The loss that the gradients are of, where there is no closure.

        Returns
        -------
        float or None
            The closure's loss.

        Raises
        ------
        InputError
            With both a closure and a loss; as :meth:`MKOR.step`.
        """
        if closure is not None and loss is not None:
            raise InputError("give a closure or a loss; the closure's loss is observed already")
        returned = super().step(closure)
        seen = returned if loss is None else loss
        if seen is not None:
            self.observe(seen)
        return returned

    def state_dict(self) -> dict[str, Any]:
        """As :meth:`MKOR.state_dict`, with what the switch has seen."""
        found = super().state_dict()
        found["mkor"]["hybrid"] = {"switched_at": self.switched_at, **self.knee.state()}
        return found

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state, switched or not, bit for bit.

        Raises
        ------
        InputError
            When the state belongs to another optimizer, or to another model.
        """
        own = state_dict.get("mkor")
        if not isinstance(own, dict) or "hybrid" not in own:
            raise InputError("this is the state of another optimizer: it has no MKOR-H switch")
        super().load_state_dict(state_dict)
        saved = own["hybrid"]
        self._hooks.remove()
        self.switched_at = saved["switched_at"]
        self.knee.load(saved)
        if self.switched_at is None:
            self._hooks.attach(self.layers, self._due)
