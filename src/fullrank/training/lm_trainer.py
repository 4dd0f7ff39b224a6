"""transformers' trainer over token sequences, with our callback and whole checkpoints.

Imported only where transformers is there; see :func:`~fullrank.training.train_lm`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler
from transformers import Trainer, TrainingArguments

from fullrank.optim import MKOR, MKORH
from fullrank.training.lm_config import LoopSection
from fullrank.training.loop import TokenCount, WholeCheckpoints, quiet_arguments


class SeededOrder(Sampler[int]):
    """All rows in an order that depends on the seed and the epoch only, so that runs resume.

    >>> order = SeededOrder(range(4), seed=0)
    >>> first = list(order)
    >>> order.set_epoch(1)
    >>> sorted(order) == sorted(first), list(order) == first
    (True, False)
    """

    def __init__(self, rows: Sized, seed: int) -> None:
        self._rows, self._seed, self._epoch = rows, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        yield from torch.randperm(len(self._rows), generator=generator).tolist()


class LMTrainer(WholeCheckpoints, Trainer):  # type: ignore[misc]
    """The trainer.

    Parameters
    ----------
    counted
        Counts the tokens trained on.
    autocast
        Type of the forward pass, or None.
    """

    def __init__(
        self, *, counted: TokenCount, autocast: torch.dtype | None, **arguments: Any
    ) -> None:
        self._counted, self._autocast = counted, autocast
        self._loss: Any = 0.0
        super().__init__(**arguments)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of equally many sequences; what is left over at the end of an epoch waits."""
        rows: Any = self.train_dataset
        size = min(self.args.train_batch_size, len(rows))
        order = SeededOrder(rows, self.args.seed)
        loader: DataLoader[Any] = DataLoader(rows, size, sampler=order, drop_last=True)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """Count the tokens of a pass, and tell optimizers of its loss that need to know."""
        self._counted.tokens += self.tokens_of(inputs)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if isinstance(optimizer, MKOR):
            # An epoch may end with a step of fewer passes.
            optimizer.grad_scale = 1.0 / self.current_gradient_accumulation_steps
        loss = super().training_step(model, inputs, num_items_in_batch)
        if isinstance(optimizer, MKORH):
            # Each pass has its share of the step's loss.
            self._loss = self._loss + loss
            if self.accelerator.sync_gradients:
                optimizer.observe(self._loss)
                self._loss = 0.0
        return loss

    def tokens_of(self, inputs: Any) -> int:
        """Tokens that all processes train on in a pass: all but the first of each sequence."""
        sequences, length = inputs["labels"].shape
        return int(sequences * (length - 1) * self.args.world_size)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Run the forward pass in the type that was chosen."""
        device = inputs["labels"].device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            return super().compute_loss(model, inputs, *args, **options)


def arguments(config: LoopSection, folder: Path, device: torch.device) -> Any:
    """Return the trainer's own settings for ours."""
    return quiet_arguments(
        TrainingArguments,
        folder,
        device,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        max_steps=config.steps,
        max_grad_norm=config.clip or 0.0,
        seed=config.seed,
        remove_unused_columns=False,
    )
