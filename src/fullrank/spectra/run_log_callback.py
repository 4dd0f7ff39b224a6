"""`RunLogCallback`: a line for whatever a Hugging Face `Trainer` logs, and its weights' ranks."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fullrank._lazy import lazy_class
from fullrank.core.errors import InputError, require
from fullrank.spectra.run_log import EVENTS


def _callback_class() -> type[Any]:
    base: Any = require("transformers", extra="hf").TrainerCallback

    class RunLogCallback(base):  # type: ignore[misc, unused-ignore]
        """Append what a trainer logs to ``events.jsonl``, for ``fullrank see run`` to show.

        Every line is written in one piece as soon as it is known, so that a run can be watched.
        Beside the trainer's own numbers it holds the effective rank of every weight matrix, at
        the start, every so many steps, and at the end; where weights are not finite, or there are
        none, a warning says so once. A run that begins anew in its folder, or is gone on with,
        takes the place of what was logged beyond that step.

        Parameters
        ----------
        folder
            Of the run; by default the trainer's ``output_dir``.
        ranks_every
            Steps between two X-rays of the weights; 0 for none. An X-ray of a 22 M encoder takes
            about a second on a core.
        include
            Shell patterns over the matrices' names; all by default.

        Examples
        --------
        >>> trainer.add_callback(RunLogCallback(ranks_every=200))  # doctest: +SKIP
        """

        def __init__(
            self,
            folder: str | Path | None = None,
            *,
            ranks_every: int = 100,
            include: list[str] | str | None = None,
        ) -> None:
            if ranks_every < 0:
                raise InputError(f"ranks_every={ranks_every}; it is 0 or a number of steps")
            self.folder = None if folder is None else Path(folder)
            self.ranks_every = ranks_every
            self.include = include
            self._measured = -1
            self._logged: set[str] = set()
            self._warned = False

        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            """Measure the weights as they came."""
            if state.is_world_process_zero:
                # An earlier run in this folder may have got further.
                start = {"kind": "start", "step": state.global_step, "time": time.time()}
                self._write(args, start)
                self._measured = -1
            if state.is_world_process_zero and self.ranks_every:
                self._ranks(args, state, model)

        def on_step_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            """Measure the weights where it is time to."""
            due = self.ranks_every and state.global_step % self.ranks_every == 0
            if state.is_world_process_zero and due:
                self._ranks(args, state, model)

        def on_train_end(
            self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
        ) -> None:
            """Measure the weights as they are in the end."""
            if state.is_world_process_zero and self.ranks_every:
                self._ranks(args, state, model)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            """Write the numbers of a step."""
            self._logged = set(logs or ())
            self._numbers(args, state, logs or {})

        def on_evaluate(
            self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any
        ) -> None:
            """Write what other callbacks have added to an evaluation since it was logged."""
            added = {n: v for n, v in (metrics or {}).items() if n not in self._logged}
            self._numbers(args, state, added)

        def _numbers(self, args: Any, state: Any, values: dict[str, Any]) -> None:
            numbers = {
                name: value
                for name, value in values.items()
                if isinstance(value, (int, float)) and not isinstance(value, bool)
            }
            if state.is_world_process_zero and numbers:
                self._write(args, {"kind": "log", "step": state.global_step, **numbers})

        def _ranks(self, args: Any, state: Any, model: Any) -> None:
            from fullrank.spectra.xray import xray

            if state.global_step == self._measured:
                return
            self._measured = state.global_step
            try:
                found = xray(model, include=self.include, show_progress=False)
            except InputError as error:
                # A log must not end the run that it is of.
                if not self._warned:
                    warnings.warn(f"no ranks at step {state.global_step}: {error}", stacklevel=2)
                self._warned = True
                return
            ranks = {name: round(m.spectrum.effective_rank, 4) for name, m in found.items()}
            record = {"kind": "ranks", "step": state.global_step, "effective_rank": ranks}
            self._write(args, {**record, "mean_share": found.mean_share})

        def _write(self, args: Any, record: dict[str, Any]) -> None:
            folder = self.folder or Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / EVENTS).open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    return RunLogCallback


__getattr__ = lazy_class(__name__, "RunLogCallback", _callback_class)


if TYPE_CHECKING:
    RunLogCallback: Any
