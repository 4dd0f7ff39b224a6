"""A Hugging Face `Trainer` in which a method adds terms of its own to the task's loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from fullrank.core.errors import require

Run = Callable[[dict[str, Any]], tuple[Tensor, Any]]
"""Model inputs -> (the task's loss, what the model returned)."""


@cache
def terms_trainer() -> type[Any]:
    """Make the class, on first use: its base lives in an optional library."""
    base: Any = require("transformers", extra="hf").Trainer

    class TermsTrainer(base):  # type: ignore[misc, unused-ignore]
        """Trains on the task's loss plus what :meth:`terms` returns; evaluates on the task's alone.

        The terms are averaged over the micro-batches of a step like the loss, whichever way the
        model normalises that, and their means since the last log stand beside it.
        """

        def terms(self, run: Run, inputs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Tensor]]:
            """Call ``run`` on the inputs; return its loss and outputs, and named, weighted terms.

            A method overrides this.
            """
            raise NotImplementedError

        def compute_loss(
            self,
            model: Any,
            inputs: dict[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Tensor | int | None = None,
        ) -> Any:
            """Add the method's terms to the task's loss."""

            def run(given: dict[str, Any]) -> tuple[Tensor, Any]:
                found: tuple[Tensor, Any] = super(TermsTrainer, self).compute_loss(
                    model, given, return_outputs=True, num_items_in_batch=num_items_in_batch
                )
                return found

            if not model.training:
                loss, outputs = run(inputs)
                return (loss, outputs) if return_outputs else loss
            loss, outputs, terms = self.terms(run, inputs)
            share = 1.0
            if self._normalises_over_step(num_items_in_batch):
                # The task's loss is a part of the whole step's mean, to be summed over
                # micro-batches; the terms are means of this micro-batch.
                share = 1.0 / self.current_gradient_accumulation_steps
            for name, term in terms.items():
                loss = loss + share * term.to(loss)
                self._note(name, term)
            return (loss, outputs) if return_outputs else loss

        def _normalises_over_step(self, num_items_in_batch: Tensor | int | None) -> bool:
            told: bool | None = getattr(self, "loss_is_scaled_for_ga", None)
            if told is not None:
                return told
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            return by_model or self.compute_loss_func is not None

        def _note(self, name: str, term: Tensor) -> None:
            seen = self.__dict__.setdefault("_terms_seen", {})
            total, count = seen.get(name, (0.0, 0))
            seen[name] = (total + term.detach(), count + 1)

        def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            """Log; beside the training loss stand the terms."""
            seen = self.__dict__.get("_terms_seen", {})
            if "loss" in logs and seen:
                logs |= {name: float(total) / count for name, (total, count) in seen.items()}
                seen.clear()
            super().log(logs, *args, **kwargs)

    return TermsTrainer
