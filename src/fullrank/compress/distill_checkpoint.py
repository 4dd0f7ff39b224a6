"""Where a recovery stands, on disk: an interrupted one goes on and ends the same, bit by bit."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from fullrank.core.errors import StoreError
from fullrank.core.files import atomic_write

# Seconds between two writings: what an interruption costs.
_EVERY = 20.0


class RecoveryCheckpoint:
    """Parameters, AdamW's moments and the number of steps done.

    Parameters
    ----------
    file
        Overwritten; another recovery's is not read.
    parameters
        As they are before the first step: with ``settings`` they say which recovery this is.
    settings
        What the course of the training depends on (JSON values).
    data
        What is trained on.
    """

    def __init__(
        self,
        file: str | Path,
        parameters: Sequence[Tensor],
        settings: dict[str, Any],
        data: Sequence[Tensor] = (),
    ) -> None:
        self.file = Path(file)
        self._parameters = list(parameters)
        written = json.dumps(settings, sort_keys=True)
        self._identity = tensors_digest(written, [*parameters, *data])
        self._written = time.monotonic()

    def resume(self, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
        """Load what is there for this recovery; return steps done and the seconds they took.

        Raises
        ------
        StoreError
            When the file is damaged.
        """
        try:
            with safe_open(self.file, framework="pt") as stored:
                found = stored.metadata() or {}
                if found.get("identity") != self._identity:
                    return 0, 0.0
                steps, seconds = int(found["steps"]), float(found["seconds"])
                values = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        except FileNotFoundError:
            return 0, 0.0
        except (OSError, SafetensorError) as error:
            raise StoreError(f"{self.file} cannot be read: {error}; remove it") from error
        for number, parameter in enumerate(self._parameters):
            with torch.no_grad():
                parameter.copy_(values[f"{number}.value"])
            if f"{number}.exp_avg" in values:
                moments = {
                    key: values[f"{number}.{key}"].to(parameter.device)
                    for key in ("exp_avg", "exp_avg_sq")
                }
                optimizer.state[parameter] = {"step": torch.tensor(float(steps)), **moments}
        return steps, seconds

    def write(
        self, optimizer: torch.optim.Optimizer, steps: int, seconds: float, *, now: bool = False
    ) -> None:
        """Keep where training stands, unless that was done a moment ago."""
        if not now and time.monotonic() - self._written < _EVERY:
            return
        tensors = {}
        for number, parameter in enumerate(self._parameters):
            tensors[f"{number}.value"] = parameter.detach().cpu().contiguous()
            for key in ("exp_avg", "exp_avg_sq"):
                if key in optimizer.state[parameter]:
                    tensors[f"{number}.{key}"] = optimizer.state[parameter][key].cpu().contiguous()
        named = {"identity": self._identity, "steps": str(steps), "seconds": repr(seconds)}
        atomic_write(self.file, safetensors_bytes(tensors, named))
        self._written = time.monotonic()

    def remove(self) -> None:
        """Forget it: the recovery is done."""
        self.file.unlink(missing_ok=True)


def tensors_digest(text: str, tensors: Iterable[Tensor]) -> str:
    """Return a hash of a text and of tensors: types, shapes and bytes."""
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(plain.numpy().tobytes())
    return digest.hexdigest()
