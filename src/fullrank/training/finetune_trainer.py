"""The trainer of a fine-tuning task: any batches, checkpoints of what is trained alone.

Imported only where transformers is there; see :func:`~fullrank.training.finetune`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from fullrank.core.errors import StoreError
from fullrank.training.finetune_tasks import Task
from fullrank.training.lm_trainer import LMTrainer, SeededOrder
from fullrank.training.loop import changing, changing_weights, load_weights

_WEIGHTS = "trained.safetensors"


class FinetuneTrainer(LMTrainer):
    """The trainer.

    Parameters
    ----------
    task
        What is trained.
    """

    def __init__(self, *, task: Task, **arguments: Any) -> None:
        self._task = task
        super().__init__(train_dataset=task.rows, **arguments)
        # An encoder's loss is ours.
        self._own_loss = task.network is not task.base
        # Many classifiers take any keyword, and leave this one unused: the trainer would count on
        # a loss that is a share of the step's, and multiply it by the number of processes.
        self.model_accepts_loss_kwargs &= task.averages_tokens

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches in an order that depends on the seed and the epoch only."""
        rows: Any = self._task.rows
        size = min(self.args.train_batch_size, len(rows))
        order = SeededOrder(rows, self.args.seed)
        loader: DataLoader[Any] = DataLoader(
            rows, size, sampler=order, drop_last=True, collate_fn=self._task.collate
        )
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared

    def tokens_of(self, inputs: Any) -> int:
        """Tokens that all processes train on in a pass; each may have another number."""
        mine = torch.tensor(self._task.tokens(inputs), device=inputs["labels"].device)
        return int(self._task.processes.total(mine))

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        """Run the forward pass in the type that was chosen."""
        if not self._own_loss:
            return super().compute_loss(model, inputs, *args, **options)
        device = inputs["labels"].device.type
        with torch.autocast(device, self._autocast, enabled=self._autocast is not None):
            return self._task.loss(model, inputs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write what training changes: trained weights, and buffers such as a router's bias.

        The rest is the base's, which a run begins with anyway. PEFT's own files would not do:
        some adapters are converted when they are saved.
        """
        model: Any = self.accelerator.unwrap_model(self.model)
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(changing_weights(model), folder / _WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        saved = load_file(Path(resume_from_checkpoint) / _WEIGHTS)
        there = changing(model or self.model)
        if saved.keys() != there.keys() or any(saved[n].shape != t.shape for n, t in there.items()):
            raise StoreError(
                f"{resume_from_checkpoint} is of a model with other trained layers; train with "
                "resume=False (--fresh) to start again"
            )
        load_weights(model or self.model, saved)
