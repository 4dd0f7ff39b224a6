"""TRP in a Hugging Face `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fullrank._lazy import lazy_class
from fullrank.compress.trp import TRP
from fullrank.core.errors import InputError, require


def _callback_class() -> type[Any]:
    base: Any = require("transformers", extra="hf").TrainerCallback

    class TRPCallback(base):  # type: ignore[misc, unused-ignore]
        """Truncates at the start of a step, adds the subgradient before the optimizer's.

        Parameters
        ----------
        trp
            Of the model that is trained.

        Notes
        -----
        The phase is that of the trainer's global step, which a checkpoint holds. The subgradient
        is added to clipped gradients and is not clipped itself.
        """

        def __init__(self, trp: TRP) -> None:
            if not isinstance(trp, TRP):
                raise InputError(f"TRPCallback takes a TRP, not a {type(trp).__name__}")
            self.trp = trp

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Refuse what would scale the subgradient."""
            if args.fp16 and not args.max_grad_norm:
                raise InputError(
                    "with fp16 gradients are scaled until they are clipped: set max_grad_norm, or "
                    "use bf16"
                )

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Truncate, if it is time."""
            self.trp.before_forward(state.global_step)

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            """Add the subgradient, if it is time."""
            self.trp.after_backward()

    return TRPCallback


__getattr__ = lazy_class(__name__, "TRPCallback", _callback_class)


if TYPE_CHECKING:
    TRPCallback: Any
