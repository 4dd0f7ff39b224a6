"""Recovery whose result is kept: the weights it reached, by the plan and what made them."""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import nn

from fullrank.compress import Distillation
from fullrank.compress.factorization import factorised
from fullrank.core.files import atomic_write
from fullrank.demo.cache import Cache
from fullrank.demo.memory import give_back_memory
from fullrank.training.quiet import training_form


class CachedRecovery:
    """Fine-tunes a factorised model, or loads what that gave the last time.

    Parameters
    ----------
    distillation
        What to do where nothing is kept.
    cache
        Where weights are kept.
    source
        JSON values that say what the result depends on beside ranks and settings: the teacher
        and the texts.
    """

    def __init__(self, distillation: Distillation, cache: Cache, source: Any) -> None:
        self._distillation, self._cache, self._source = distillation, cache, source

    def __call__(self, student: nn.Module) -> None:
        """Recover the student, in place."""
        settings = self._distillation
        ranks = [(name, layer.rank, layer.method) for name, layer in factorised(student)]
        path = self._cache.path(
            "recovered", self._source, ranks, settings.steps, settings.lr, settings.seed
        )
        try:
            student.load_state_dict(load_file(path))
            self._cache.hits += 1
        except (OSError, SafetensorError, RuntimeError):
            # The form in which a CPU trains fastest; it leaves the weights as they are.
            on_cpu = next(student.parameters()).device.type == "cpu"
            with training_form(
                student, freeze_embeddings=True, dropout=None, plain_attention=on_cpu
            ):
                settings(student)
            tensors = {n: t.detach().contiguous() for n, t in student.state_dict().items()}
            atomic_write(path, safetensors_bytes(tensors))
            give_back_memory()
