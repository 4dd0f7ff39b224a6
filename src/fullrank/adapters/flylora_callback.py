"""`FlyLoraCallback`: a Hugging Face `Trainer` that balances FlyLoRA's experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fullrank._lazy import lazy_class
from fullrank.adapters.flylora_model import FlyLoraModel
from fullrank.core.errors import require


def _callback_class() -> type[Any]:
    base: Any = require("transformers", extra="hf").TrainerCallback

    class FlyLoraCallback(base):  # type: ignore[misc, unused-ignore]
        """Balance FlyLoRA's experts after every optimizer step.

        Examples
        --------
        >>> trainer.add_callback(FlyLoraCallback())  # doctest: +SKIP
        """

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            """Move each d by the experts' use in the step."""
            for module in model.modules():
                if isinstance(module, FlyLoraModel):
                    module.update_balance()

    return FlyLoraCallback


__getattr__ = lazy_class(__name__, "FlyLoraCallback", _callback_class)


if TYPE_CHECKING:
    FlyLoraCallback: Any
