"""One training from its parts: the same for language models, adapters and encoders."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from fullrank.core.progress import progress as progress_bar
from fullrank.spectra.run_log import EVENTS
from fullrank.training.checkpoints import CHECKPOINTS
from fullrank.training.history import TrainingHistory
from fullrank.training.interrupt import Interrupt
from fullrank.training.optimizers import StateMemory, measure_state
from fullrank.training.processes import Processes, SharedClock
from fullrank.training.quiet import own_randomness, quiet_libraries
from fullrank.training.results import RESULT, checked_folder
from fullrank.training.schedule import TimeBox

if TYPE_CHECKING:
    from fullrank.training.loop import Measure, TokenCount


@dataclass
class TokenCounter:
    """Counts the tokens that a model was trained on."""

    tokens: int = 0


@dataclass(frozen=True)
class Pace:
    """How far a training goes, and how often it is measured.

    Attributes
    ----------
    steps, seconds
        Optimizer steps, and the time it may take; whichever ends first.
    warmup, decay
        Of the learning rate; see :class:`~fullrank.training.schedule.TimeBox`.
    evaluations, patience
        How many, and after how many without a better one it stops.
    """

    steps: int
    seconds: float | None
    warmup: float
    decay: Any
    evaluations: int
    patience: int | None

    @classmethod
    def of(cls, settings: Any, steps: int | None = None) -> Pace:
        """Take these settings from those of a run."""
        return cls(
            settings.steps if steps is None else steps,
            settings.seconds,
            settings.warmup,
            settings.decay,
            settings.evaluations,
            settings.patience,
        )


@dataclass(frozen=True)
class Parts:
    """What is particular to one kind of training.

    Attributes
    ----------
    model
        What is trained.
    measure, history
        The development metric, and where it is recorded.
    counted
        Counts the tokens.
    optimizer, optimizer_name
        Makes the optimizer once the model is as it trains; its name for the memory table.
    trainer
        Makes the Hugging Face trainer, from ``loop``, ``identity``, ``workplace`` and
        ``optimizers``.
    around
        What is entered for the time of the training.
    """

    model: Any
    measure: Measure
    history: TrainingHistory
    counted: TokenCount
    optimizer: Callable[[], torch.optim.Optimizer]
    optimizer_name: str
    trainer: Callable[..., Any]
    around: Callable[[torch.optim.Optimizer], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True)
class Fitted:
    """How a training went; the model has its best weights.

    Attributes
    ----------
    history, memory
        Curves, and bytes of the optimizer's state.
    interrupted
        Whether the user pressed Ctrl-C in the last step.
    """

    history: TrainingHistory
    memory: StateMemory
    interrupted: bool


def fit(
    parts: Parts,
    pace: Pace,
    *,
    identity: dict[str, Any],
    folder: Path | None,
    processes: Processes,
    device: torch.device,
    progress: bool,
    ranks_every: int = 0,
) -> Fitted:
    """Train a model to the end of its pace, and leave it with its best weights.

    Parameters
    ----------
    parts, pace
        What is trained, and for how long.
    identity
        What must be the same for a checkpoint to be continued.
    folder
        Where checkpoints are written and looked for; None writes none that stays.
    processes, device
        Who trains together, and where this one computes.
    progress
        Show a bar with the time left.
    ranks_every
        Steps between two X-rays of the weights in the folder's log, which ``fullrank see run``
        shows; 0 for none.

    Raises
    ------
    KeyboardInterrupt
        After Ctrl-C, once the step is finished and a checkpoint is written.
    """
    from fullrank.spectra.run_log_callback import RunLogCallback
    from fullrank.training.loop import Loop, continue_from, load_weights, run

    with ExitStack() as stack:
        workplace = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        interrupt = stack.enter_context(Interrupt(folder is not None))
        clock = SharedClock(processes, device, lambda: interrupt.wanted)
        box = TimeBox(pace.steps, pace.seconds, warmup=pace.warmup, decay=pace.decay, clock=clock)
        loop = Loop(
            box,
            parts.measure,
            parts.history,
            parts.counted,
            evaluations=pace.evaluations,
            patience=pace.patience,
            saves=folder is not None,
            advance=stack.enter_context(progress_bar("train", 100, progress, unit="%")),
            clock=clock,
        )
        checkpoint = continue_from(loop, workplace, identity, parts.model)
        optimizer = parts.optimizer()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, box.factor)
        trainer = parts.trainer(
            loop=loop, identity=identity, workplace=workplace, optimizers=(optimizer, schedule)
        )
        if folder is not None:
            if checkpoint is None:
                (folder / EVENTS).unlink(missing_ok=True)
            trainer.add_callback(RunLogCallback(folder, ranks_every=ranks_every))
        stack.enter_context(parts.around(optimizer))
        run(trainer, loop, checkpoint, clock)
        memory = measure_state(trainer.optimizer, parts.model, parts.optimizer_name, loop.peak)
        load_weights(parts.model, loop.best)
        parts.model.zero_grad(set_to_none=True)
        return Fitted(loop.history, memory, interrupt.wanted)


class Training(Protocol):
    """A run that :func:`carried_out` takes from its settings to its folder."""

    interrupted: bool

    def finished(self, folder: Path) -> Any:
        """Load the run that was finished in a folder, if it is this one."""

    def run(self, progress: bool) -> Any:
        """Train."""

    def save(self, trained: Any, folder: Path) -> None:
        """Put what came of it into the folder."""


def carried_out(
    prepare: Callable[[Path | None, Processes], Training],
    out: str | Path | None,
    *,
    progress: bool,
    resume: bool,
) -> Any:
    """Train in a folder: go on with what was begun there, load what was finished.

    Parameters
    ----------
    prepare
        Makes the training, from the folder and the processes that train together.
    out
        The folder; None trains without one.
    progress
        Show bars.
    resume
        False trains from the start, whatever is in the folder.
    """
    folder = None if out is None else checked_folder(Path(out))
    processes = Processes()
    with quiet_libraries(), own_randomness():
        training = prepare(folder, processes)
        with processes.main_first() as main:
            if main and folder is not None and not resume:
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
                (folder / RESULT).unlink(missing_ok=True)
        if folder is not None and (folder / RESULT).is_file():
            return training.finished(folder)
        trained = training.run(progress and processes.main)
        with processes.main_first() as main:
            if main and folder is not None:
                training.save(trained, folder)
    if training.interrupted:
        raise KeyboardInterrupt
    return trained
