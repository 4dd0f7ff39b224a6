"""sentence-transformers' trainer with our batches, callbacks and whole checkpoints.

Imported only where sentence-transformers is there; see :func:`~fullrank.training.train_encoder`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sentence_transformers import SentenceTransformerTrainer
from sentence_transformers.base.sampler import DefaultBatchSampler

from fullrank.training.loop import WholeCheckpoints


class PairSampler(DefaultBatchSampler):  # type: ignore[misc]
    """Batches in an order that depends on the seed and the epoch only, so that runs resume."""

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.sampler), generator=generator).tolist()
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch


class EncoderTrainer(WholeCheckpoints, SentenceTransformerTrainer):  # type: ignore[misc]
    """The trainer, with our callback and checkpoints."""

    def add_model_card_callback(self, default_args_dict: dict[str, Any]) -> None:
        """Leave the model card out: it asks the hub about models and data."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        self.model.save_pretrained(output_dir or self.args.output_dir, create_model_card=False)
