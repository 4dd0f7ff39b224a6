"""One training loop for all methods, so that their budgets are equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fullrank.bench.shrink_subject import Subject

Loss = Callable[[nn.Module, Any], Tensor]
Prepare = Callable[[torch.optim.Optimizer], object]


def train(
    subject: Subject,
    model: nn.Module,
    steps: int,
    *,
    seed: int,
    lr: float | None = None,
    loss: Loss | None = None,
    prepare: Prepare = lambda _: None,
) -> nn.Module:
    """Train in place: AdamW, a tenth of the steps to warm up, then linearly down to 0.

    Parameters
    ----------
    subject
        Gives batches, the loss and the mode.
    model
        What is trained: all parameters that ask for gradients, but token embeddings.
    steps, seed
        How long, and the order of batches.
    lr, loss
        In place of the subject's.
    prepare
        Given the optimizer, say to hook something onto its steps.

    Returns
    -------
    Module
        The same model, in evaluation mode.
    """
    peak = lr or subject.lr
    fixed = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    wanted = [p for p in model.parameters() if p.requires_grad and id(p) not in fixed]
    optimizer = torch.optim.AdamW(wanted, lr=peak, weight_decay=0.0)
    prepare(optimizer)
    warmup = max(1, steps // 10)
    measure = loss or subject.loss
    batches = subject.training(seed)
    subject.ready(model)
    for step in range(steps):
        rate = peak * min((step + 1) / warmup, 1 - step / steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        measure(model, next(batches)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(wanted, 1.0)
        optimizer.step()
    model.zero_grad(set_to_none=True)
    return model.eval()
