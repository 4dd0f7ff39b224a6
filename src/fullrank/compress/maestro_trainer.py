"""Maestro in a Hugging Face `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from fullrank._lazy import lazy_class
from fullrank.compress.maestro import Maestro
from fullrank.compress.training_loss import Run, terms_trainer
from fullrank.core.errors import InputError, require

# Where a checkpoint's trainer_state.json keeps what sampling needs to go on.
_KEY = "fullrank.maestro"


def _callback(maestro: Maestro, shrink_every: int | None) -> Any:
    base: Any = require("transformers", extra="hf").TrainerCallback

    class Conduct(base):  # type: ignore[misc, unused-ignore]
        """Shrinks when it is time, and keeps the sampler's place in the trainer's state."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Go on where a checkpoint stopped."""
            if _KEY in state.stateful_callbacks:
                maestro.load_state_dict(state.stateful_callbacks[_KEY])

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Shrink before the checkpoint of this step is written, never after it."""
            if shrink_every is None:
                due = state.epoch is not None and float(state.epoch).is_integer()
            else:
                due = state.global_step % shrink_every == 0
            if due:
                maestro.shrink()
            state.stateful_callbacks[_KEY] = maestro.state_dict()

    return Conduct()


def _trainer_class() -> type[Any]:
    base: Any = terms_trainer()

    class MaestroTrainer(base):  # type: ignore[misc, unused-ignore]
        """A ``transformers.Trainer`` that conducts a Maestro training.

        Parameters
        ----------
        maestro
            Of the model to train, which it has factorised already.
        shrink_every
            Optimizer steps between shrinkings; by default at the end of every epoch.
        args, kwargs
            As for ``Trainer``, without ``model``.

        Notes
        -----
        Each micro-batch draws its own layer and rank. The log has ``group_lasso``, weighted,
        beside ``loss``. Evaluation runs at full ranks; call ``maestro.recalibrate_bn`` before it
        if the model has batch norms.
        """

        def __init__(
            self,
            maestro: Maestro,
            *args: Any,
            shrink_every: int | None = None,
            **kwargs: Any,
        ) -> None:
            if shrink_every is not None and shrink_every < 1:
                raise InputError(f"shrink_every={shrink_every}; it is at least 1")
            self.maestro = maestro
            super().__init__(maestro.model, *args, **kwargs)
            self.add_callback(_callback(maestro, shrink_every))

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            """Draw, and stay at it through backward: checkpointed layers run again then."""
            with self.maestro.sample():
                loss: Tensor = super().training_step(*args, **kwargs)
            return loss

        def terms(self, run: Run, inputs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Tensor]]:
            """The sampled model's loss, and the group lasso."""
            loss, outputs = run(inputs)
            return loss, outputs, {"group_lasso": self.maestro.penalty()}

    return MaestroTrainer


__getattr__ = lazy_class(__name__, "MaestroTrainer", _trainer_class)


if TYPE_CHECKING:
    MaestroTrainer: Any
