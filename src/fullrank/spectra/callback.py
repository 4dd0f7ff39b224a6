"""RankMe in the training log of a Hugging Face `Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from fullrank._lazy import lazy_class
from fullrank.core.errors import InputError, require
from fullrank.core.modes import evaluating
from fullrank.spectra.rankme import EPS, RankMeMeter

if TYPE_CHECKING:
    from torch import nn

Embed = Callable[["nn.Module"], "Iterable[Any] | Any"]


def _measure(model: nn.Module, embed: Embed, eps: float) -> float:
    """RankMe of what ``embed(model)`` gives, with the model in evaluation mode meanwhile."""
    with torch.no_grad(), evaluating(model):
        found = embed(model)
        meter = RankMeMeter(eps)
        whole = hasattr(found, "ndim")
        for batch in [found] if whole else found:
            meter.update(batch)
    meter.sync()
    return meter.compute()


def _callback_class() -> type[Any]:
    base: Any = require("transformers", extra="hf").TrainerCallback

    class RankMeCallback(base):  # type: ignore[misc, unused-ignore]
        """Log RankMe of the embeddings at every evaluation, as ``eval/rankme``.

        Parameters
        ----------
        embed
            Given the model, returns embeddings ``(N, K)`` or an iterable of such batches. Use the
            same inputs each time, and several times more of them than the width K.
        eps
            See :func:`~fullrank.spectra.rankme`.
        key
            Name in the log.

        Attributes
        ----------
        history
            ``(step, score)`` of every evaluation.

        Notes
        -----
        The model is in evaluation mode while it embeds, without gradients. Over several
        processes the samples of all count. Callbacks that come after this one get the score in
        the evaluation's log; :class:`~fullrank.spectra.RunLogCallback` wherever it stands.
        """

        def __init__(self, embed: Embed, eps: float = EPS, key: str = "eval/rankme") -> None:
            if not callable(embed):
                raise InputError(f"embed is a {type(embed).__name__}; expected a function of model")
            self.embed = embed
            self.eps = eps
            self.key = key
            self.history: list[tuple[int, float]] = []
            # Trainers may hand a copy of what was logged to `on_evaluate`.
            self._logged: float | None = None

        def on_log(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            """Measure when an evaluation is logged, and log with it."""
            logs = kwargs.get("logs") or {}
            if any(name.endswith("_runtime") and name != "train_runtime" for name in logs):
                self._logged = logs[self.key] = self._measured(state, model)
                state.log_history[-1][self.key] = logs[self.key]

        def on_evaluate(
            self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
        ) -> None:
            """Measure and log where the evaluation was not logged; add to its metrics."""
            metrics = kwargs.get("metrics")
            score, self._logged = self._logged, None
            if score is None:
                score = self._measured(state, model)
                state.log_history.append({self.key: score, "step": state.global_step})
            if metrics is not None:
                metrics[self.key] = score

        def _measured(self, state: Any, model: Any) -> float:
            score = _measure(model, self.embed, self.eps)
            self.history.append((state.global_step, score))
            return score

    return RankMeCallback


__getattr__ = lazy_class(__name__, "RankMeCallback", _callback_class)


if TYPE_CHECKING:
    RankMeCallback: Any
