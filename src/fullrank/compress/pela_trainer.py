"""PELA's intermediate stage in a Hugging Face `Trainer`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from fullrank._lazy import lazy_class
from fullrank.compress.pela_features import Which
from fullrank.compress.pela_loss import Form, PELALoss
from fullrank.compress.training_loss import Run, terms_trainer


def _trainer_class() -> type[Any]:
    base: Any = terms_trainer()

    class PELATrainer(base):  # type: ignore[misc, unused-ignore]
        """A ``transformers.Trainer`` for a PELA student.

        Parameters
        ----------
        model
            The student, from :func:`~fullrank.compress.pela_compress`.
        teacher
            The original model; frozen, in evaluation mode, on the student's device. It is not
            part of the checkpoints: pass it again to resume.
        alpha, beta, eps, hidden_states, perturbation, every, ignore_padding
            See :class:`~fullrank.compress.PELALoss`; ``every`` counts optimizer steps.
        args, kwargs
            As for ``Trainer``.

        Notes
        -----
        The log has ``feature_loss`` and ``perturbation_loss``, weighted, beside ``loss``, their
        sum with the task's. Evaluation reports the task's loss alone.
        """

        def __init__(
            self,
            model: nn.Module,
            teacher: nn.Module,
            *args: Any,
            alpha: float = 1.0,
            beta: float = 1.0,
            eps: float = 1e-3,
            hidden_states: Which = "all",
            perturbation: Form = "hinge",
            every: int = 1,
            ignore_padding: bool = True,
            **kwargs: Any,
        ) -> None:
            self.pela = PELALoss(
                model,
                teacher,
                alpha,
                beta,
                eps,
                hidden_states,
                perturbation=perturbation,
                every=every,
                ignore_padding=ignore_padding,
            )
            super().__init__(model, *args, **kwargs)
            teacher.to(self.args.device)

        def terms(self, run: Run, inputs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Tensor]]:
            """One pass of the student, one of the teacher."""
            loss, terms = self.pela, {}
            if loss.student_features is None:
                task, output = run(inputs)
            else:
                features = loss.student_features
                with features.watching() as seen:
                    task, output = run(features.asking(inputs))
                states = features.states(output, seen)
                terms["feature_loss"] = loss.alpha * loss.feature_distance(inputs, states)
            # By the step, which resuming restores, not by the call.
            if loss.beta and self.state.global_step % loss.every == 0:
                terms["perturbation_loss"] = loss.beta * loss.perturbation()
            return task, output, terms

    return PELATrainer


__getattr__ = lazy_class(__name__, "PELATrainer", _trainer_class)


if TYPE_CHECKING:
    PELATrainer: Any
