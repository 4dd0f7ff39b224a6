"""Recovery after shrinking: the small model learns to give the large one's outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.compress.batches import Batches, Output, both_masks, output_of
from fullrank.compress.distill_checkpoint import RecoveryCheckpoint
from fullrank.core.batches import call, tensors_in
from fullrank.core.errors import InputError
from fullrank.core.modes import evaluating
from fullrank.core.progress import progress as progress_bar


@dataclass
class Distillation:
    """Fine-tune a shrunk model on the outputs of the original, which needs no labels.

    Callable as ``recover`` of :func:`~fullrank.compress.shrink`. Sentence embeddings and hidden
    states are matched by squared error, logits by their Kullback-Leibler divergence. Token
    embeddings stay as they are; every other parameter that is trainable is trained. What the
    training reaches is compared on batches it never saw, and dropped if it is no better.

    Parameters
    ----------
    teacher
        The original model; it is not changed.
    data
        Texts or batches, as for calibration. The last tenth of the batches is held out.
    steps
        Optimizer steps.
    lr
        Peak learning rate of AdamW, reached after a tenth of the steps and lowered to 0.
    seconds
        Stop early, with the learning rate lowered by then. Which step that is depends on the
        machine: None makes runs repeatable.
    batch_size, max_length, tokenizer
        Of texts; see :class:`~fullrank.compress.Batches`.
    autocast
        What both models compute in meanwhile, e.g. ``torch.bfloat16`` where the hardware
        multiplies it natively; None leaves them as they are.
    seed
        Of the order of batches.
    progress
        Show a bar.
    checkpoint
        File in which an unfinished recovery is kept: called again with the same student, it goes
        on there and ends as if it had not been interrupted. Removed at the end.

    Attributes
    ----------
    before, after
        Mean loss on the held-out batches, of the last call.

    Examples
    --------
    >>> import copy
    >>> teacher = nn.Linear(4, 4)
    >>> student, data = copy.deepcopy(teacher), [torch.randn(8, 4) for _ in range(20)]
    >>> _ = student.weight.data.mul_(0.5)
    >>> recover = Distillation(teacher, data, steps=30, lr=1e-2)
    >>> recover(student)
    >>> recover.after < recover.before
    True
    """

    teacher: nn.Module
    data: Iterable[Any]
    steps: int = 100
    lr: float = 1e-4
    seconds: float | None = None
    batch_size: int = 32
    max_length: int | None = None
    tokenizer: Callable[..., Any] | None = None
    autocast: torch.dtype | None = None
    seed: int = 0
    progress: bool = False
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.lr > 0:
            raise InputError(f"steps={self.steps}, lr={self.lr}: both must be positive")
        size, data = self.batch_size, self.data
        if isinstance(data, Sequence) and len(data) > 1 and isinstance(data[0], str):
            # One batch is held out, so that few texts are made into two.
            size = min(size, len(data) // 2)
        source = Batches(
            self.teacher,
            data,
            batch_size=size,
            max_length=self.max_length,
            tokenizer=self.tokenizer,
        )
        self._batches = list(source)
        if len(self._batches) < 2:
            raise InputError(
                "distillation needs at least two batches, one to check on: give two texts or more, "
                "or data in smaller batches"
            )
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(self._batches), generator=generator).tolist()
        held = max(1, len(order) // 10)
        self._held, self._train = order[:held], order[held:]
        self._targets: dict[int, Output] = {}
        self.before = self.after = float("nan")

    def __call__(self, student: nn.Module) -> None:
        """Train the student, in place."""
        with self._both(student) as parameters:
            start = [p.detach().clone() for p in parameters]
            self.before = self._check(student)
            self._train_steps(student, parameters)
            self.after = self._check(student)
            if not self.after < self.before:
                with torch.no_grad():
                    for parameter, value in zip(parameters, start, strict=True):
                        parameter.copy_(value)
                self.after = self.before

    @contextmanager
    def _both(self, student: nn.Module) -> Iterator[list[Tensor]]:
        """Make both models ready; yield what is trained."""
        # Without dropout, both see the same function of the same batch.
        with _trainable(student) as parameters, evaluating(student), evaluating(self.teacher):
            if not parameters:
                raise InputError("the model to recover has no trainable parameter")
            yield parameters

    # What a method that shrinks meanwhile does at each turn.

    def _prepare(self, optimizer: torch.optim.Optimizer) -> None:
        """Once, before the first step."""

    def _begin(self, step: int, done: bool) -> None:
        """At each step; ``done`` where an earlier run made it."""

    def _finish(self, kept: RecoveryCheckpoint, optimizer: torch.optim.Optimizer) -> None:
        """After the last step, with the file that keeps where training stands."""
        kept.remove()

    def _train_steps(self, student: nn.Module, parameters: list[Tensor]) -> None:
        optimizer = torch.optim.AdamW(parameters, lr=self.lr, weight_decay=0.0)
        generator = torch.Generator().manual_seed(self.seed + 1)
        self._prepare(optimizer)
        kept = self._checkpoint(parameters)
        first, spent = (0, 0.0) if kept is None else kept.resume(optimizer)
        start = time.monotonic() - spent
        order: list[int] = []
        with progress_bar("recover", self.steps, self.progress, "steps") as advance:
            for step in range(self.steps):
                if not order:
                    shuffle = torch.randperm(len(self._train), generator=generator)
                    order = [self._train[i] for i in shuffle.tolist()]
                index = order.pop()
                if step < first:
                    self._begin(step, done=True)
                    advance(1)
                    continue
                done = step / self.steps
                if self.seconds is not None:
                    done = max(done, (time.monotonic() - start) / self.seconds)
                if done >= 1:
                    break
                rate = self.lr * min(1.0, (step + 1) / max(1, self.steps // 10)) * (1 - done)
                for group in optimizer.param_groups:
                    group["lr"] = rate
                self._begin(step, done=False)
                loss = self._loss(student, index)
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                if kept is not None:
                    kept.write(optimizer, step + 1, time.monotonic() - start)
                advance(1)
        if kept is not None:
            self._finish(kept, optimizer)

    def _checkpoint(self, parameters: list[Tensor]) -> RecoveryCheckpoint | None:
        if self.checkpoint is None:
            return None
        names = ("steps", "lr", "seconds", "seed", "alpha", "beta", "eps")
        settings = {name: getattr(self, name) for name in names if hasattr(self, name)}
        shapes = [len(self._batches), type(self).__name__]
        data = [tensor for batch in self._batches for tensor in tensors_in(batch)]
        settings = {**settings, "batches": shapes, **self._particulars()}
        return RecoveryCheckpoint(self.checkpoint, parameters, settings, data)

    def _particulars(self) -> dict[str, Any]:
        """What else the course of the training depends on (JSON values)."""
        return {}

    def _loss(self, student: nn.Module, index: int) -> Tensor:
        batch = self._batches[index]
        masks = both_masks(batch)
        target = self._targets.get(index)
        if target is None:
            with torch.no_grad(), self._precision(self.teacher):
                target = output_of(call(self.teacher, batch), *masks)
            # Worth keeping only where it is small: one row a text, not one a token.
            if not target.logits:
                self._targets[index] = target
        with self._precision(student):
            output = output_of(call(student, batch), *masks)
        if output.logits:
            return nn.functional.kl_div(
                output.value.float().log_softmax(-1),
                target.value.float().log_softmax(-1),
                reduction="batchmean",
                log_target=True,
            )
        return (output.value.float() - target.value.float()).square().sum(-1).mean()

    def _precision(self, student: nn.Module) -> torch.autocast:
        device = next(student.parameters()).device.type
        return torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None)

    @torch.no_grad()
    def _check(self, student: nn.Module) -> float:
        losses = [self._loss(student, index) for index in self._held]
        return float(torch.stack(losses).mean())


@contextmanager
def _trainable(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield what is to be trained; token embeddings ask for no gradient meanwhile."""
    frozen = [
        p
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for p in module.parameters()
        if p.requires_grad
    ]
    for parameter in frozen:
        parameter.requires_grad_(False)
    try:
        yield [p for p in model.parameters() if p.requires_grad]
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for parameter in model.parameters():
            parameter.grad = None
