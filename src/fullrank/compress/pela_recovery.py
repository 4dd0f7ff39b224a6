"""PELA's intermediate stage as a recovery: what a search does with each candidate it measures."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from fullrank.compress.distill import Distillation
from fullrank.compress.layers_record import factorised
from fullrank.compress.pela_features import Which
from fullrank.compress.pela_loss import PELALoss


@dataclass
class PELARecovery(Distillation):
    """Train a shrunk model by PELA's loss: hidden states, weights, and labels where there are some.

    As :class:`~fullrank.compress.Distillation`, with another loss; the paper trains for epochs
    on the pre-training data, which :class:`~fullrank.compress.PELATrainer` does.

    Parameters
    ----------
    alpha, beta, eps, hidden_states
        See :class:`~fullrank.compress.PELALoss`.

    Examples
    --------
    >>> import torch
    >>> from fullrank.compress import pela_compress
    >>> teacher = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    >>> recover = PELARecovery(teacher, [torch.randn(8, 32) for _ in range(9)], steps=30, lr=1e-2)
    >>> recover(pela_compress(teacher))
    >>> recover.after < recover.before
    True
    """

    alpha: float = 1.0
    beta: float = 1.0
    eps: float = 1e-3
    hidden_states: Which = "all"

    def __call__(self, student: nn.Module) -> None:
        """Train the student, in place; one without factorised layers is left as it is."""
        if not any(True for _ in factorised(student)):
            return
        # The loss freezes the teacher for good; here it is the user's model.
        wanted = [(p, p.requires_grad) for p in self.teacher.parameters()]
        self._pela = PELALoss(
            student, self.teacher, self.alpha, self.beta, self.eps, self.hidden_states
        )
        try:
            super().__call__(student)
        finally:
            for parameter, flag in wanted:
                parameter.requires_grad_(flag)

    def _loss(self, student: nn.Module, index: int) -> Tensor:
        with self._precision(student):
            return self._pela(self._batches[index])
