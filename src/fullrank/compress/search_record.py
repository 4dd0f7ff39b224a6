"""What a search measured so far, on disk: an interrupted one goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from fullrank.core.errors import InputError, PlanError, StoreError
from fullrank.core.files import atomic_write, atomic_write_by
from fullrank.core.plan import RankPlan

_FORMAT = 1


class Measured(NamedTuple):
    """One plan that was built, recovered and measured.

    Attributes
    ----------
    values
        What the metric gave.
    parameters
        Of the whole model.
    seconds
        It took.
    """

    plan: RankPlan
    values: npt.NDArray[np.float64]
    parameters: int
    seconds: float


class SearchRecord:
    """The measured plans of one search, by the share that was asked for.

    Parameters
    ----------
    folder
        Made on the first write. ``search.json`` holds the values, ``chosen.safetensors`` the
        weights of the model that was best when it was written.
    identity
        What the values depend on (JSON values): model, data, metric, method, options.

    Raises
    ------
    InputError
        When the folder holds a search with another identity.
    StoreError
        When its file is damaged.
    """

    def __init__(self, folder: str | Path, identity: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._identity = json.loads(json.dumps(dict(identity)))
        self._measured: dict[float, Measured] = {}
        self.reference: npt.NDArray[np.float64] | None = None
        if self._file.is_file():
            self._read()

    def __len__(self) -> int:
        return len(self._measured)

    def get(self, share: float) -> Measured | None:
        """Return what was measured at a share, if it was."""
        return self._measured.get(share)

    @property
    def seconds(self) -> float:
        """Time that the measured plans took."""
        return sum(m.seconds for m in self._measured.values())

    def add(self, share: float, measured: Measured) -> None:
        """Keep a result, on disk too."""
        self._measured[share] = measured
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        reference = None if self.reference is None else self.reference.tolist()
        record = {
            "format": _FORMAT,
            "identity": self._identity,
            "reference": reference,
            "measured": [
                {
                    "share": share,
                    "plan": m.plan.to_json(),
                    "values": m.values.tolist(),
                    "parameters": m.parameters,
                    "seconds": m.seconds,
                }
                for share, m in self._measured.items()
            ],
        }
        atomic_write(self._file, json.dumps(record).encode())

    def keep(self, share: float, model: nn.Module) -> None:
        """Keep the weights of the model measured at a share; those kept before are dropped."""

        def write(file: Path) -> None:
            save_model(model, str(file), {"share": repr(share)})

        atomic_write_by(self._weights, write)

    def restore(self, share: float, model: nn.Module) -> bool:
        """Load the weights kept for a share into a model built by its plan, if they are there."""
        try:
            with safe_open(self._weights, framework="pt") as file:
                if (file.metadata() or {}).get("share") != repr(share):
                    return False
            load_model(model, str(self._weights))
        except FileNotFoundError:
            return False
        except (OSError, RuntimeError, SafetensorError) as error:
            raise StoreError(f"{self._weights} cannot be read: {error}; remove it") from error
        return True

    @property
    def _file(self) -> Path:
        return self.folder / "search.json"

    @property
    def _weights(self) -> Path:
        return self.folder / "chosen.safetensors"

    def _read(self) -> None:
        try:
            record = json.loads(self._file.read_text(encoding="utf-8"))
            found = dict(record["identity"])
            if record["reference"] is not None:
                self.reference = np.asarray(record["reference"], dtype=np.float64)
            self._measured = {
                float(m["share"]): Measured(
                    RankPlan.from_json(m["plan"]),
                    np.asarray(m["values"], dtype=np.float64),
                    int(m["parameters"]),
                    float(m["seconds"]),
                )
                for m in record["measured"]
            }
        except (OSError, ValueError, KeyError, TypeError, PlanError) as error:
            raise StoreError(
                f"{self._file} cannot be read as a search ({error}); remove {self.folder}"
            ) from error
        names = {**self._identity, **found}
        other = [n for n in names if found.get(n) != self._identity.get(n)]
        if other:
            raise InputError(
                f"{self.folder} holds a search with another {', '.join(sorted(other))}; give a "
                "new folder, or remove it"
            )
