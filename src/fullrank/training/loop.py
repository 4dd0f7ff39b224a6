"""What happens between a trainer's steps, and checkpoints that appear whole or not at all.

Imported only where transformers is there; used by every training loop of this package.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PrinterCallback, TrainerCallback

from fullrank.core.errors import DivergedError, FullrankError, StoreError
from fullrank.optim.memory import state_bytes
from fullrank.training.checkpoints import (
    CHECKPOINTS,
    Progress,
    check_identity,
    newest,
    publish,
    read_progress,
    write_progress,
)
from fullrank.training.history import EvaluationRecord, StepRecord, TrainingHistory
from fullrank.training.processes import Processes, SharedClock
from fullrank.training.schedule import TimeBox

Weights = dict[str, torch.Tensor]
Measure = Callable[[Any], tuple[float, float | None]]
"""Model -> development metric, and RankMe where there are embeddings to take it of."""

# Share of a time box that evaluations may take.
_EVALUATING = 0.2


class TokenCount(Protocol):
    """Something that counts the tokens a model was trained on."""

    tokens: int


class Loop(TrainerCallback):  # type: ignore[misc]
    """What happens between steps: records, evaluations, the best weights, the end.

    Parameters
    ----------
    box
        How far the run is.
    measure
        What is measured at each evaluation.
    history
        Where it is recorded.
    counted
        Counts the tokens.
    evaluations, patience
        See :class:`~fullrank.training.EncoderTraining`.
    saves
        Whether a checkpoint is written at every evaluation.
    advance
        Moves the progress bar by so many percent.
    clock
        What ``box`` reads; says whether the user wants to stop.
    """

    def __init__(
        self,
        box: TimeBox,
        measure: Measure,
        history: TrainingHistory,
        counted: TokenCount,
        *,
        evaluations: int,
        patience: int | None,
        saves: bool,
        advance: Callable[[int], None],
        clock: SharedClock,
    ) -> None:
        self.box = box
        self.measure = measure
        self.history = history
        self.counted = counted
        self.best: Weights = {}
        self.peak = 0
        self.began = False
        self.next_share = 1 / evaluations
        self.evaluations = evaluations
        self._patience = patience
        self._saves = saves
        self._advance = advance
        self._clock = clock
        self._percent = 0
        self._step_seconds = 0.0

    def restore(self, progress: Progress, best: Weights) -> None:
        """Continue where a checkpoint was written."""
        self.history = progress.history
        self.best = best
        self.peak = progress.peak
        self.next_share = progress.next_share
        self.evaluations = progress.evaluations
        self.counted.tokens = progress.tokens
        self.box.start(progress.elapsed)

    def progress(self, identity: dict[str, Any]) -> Progress:
        """Return what a checkpoint needs to know of this."""
        return Progress(
            identity,
            elapsed=self.box.elapsed,
            tokens=self.counted.tokens,
            peak=self.peak,
            evaluations=self.evaluations,
            next_share=self.next_share,
            history=self.history,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock; measure the model as it came."""
        self.began = True
        if not self.history.evaluations and not state.global_step:
            self._clock.agree()
            self.box.start()
            self._evaluate(0, kwargs["model"])
            self._afford(self.history.evaluations[0].took)

    def _afford(self, took: float) -> None:
        """Evaluate less often where it would take more than its share of the time."""
        if self.box.seconds is not None and took > 0:
            affordable = int(_EVALUATING * self.box.seconds / took) - 1
            self.evaluations = max(1, min(self.evaluations, affordable))
            self.next_share = 1 / self.evaluations

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate, save or stop, where it is time to."""
        step = state.global_step
        self._clock.agree()
        stopping = self._clock.stop
        self._step_seconds = self.box.elapsed
        self.peak = max(self.peak, state_bytes(kwargs["optimizer"]))
        share = self.box.progress(step)
        self._show(share)
        if share >= 1:
            self.history.stopped = "steps" if step >= self.box.max_steps else "time"
        if share >= self.next_share - 1e-9 or self.history.stopped:
            self.next_share = (math.floor(share * self.evaluations + 1e-9) + 1) / self.evaluations
            self._evaluate(step, kwargs["model"])
            if self._patience is not None and self.history.since_best >= self._patience:
                self.history.stopped = self.history.stopped or "patience"
            control.should_save = self._saves and not self.history.stopped
        if stopping and not self.history.stopped:
            # After the evaluation that was due, which would come later in a run that goes on.
            control.should_save = self._saves
            control.should_training_stop = True
            return
        control.should_training_stop = bool(self.history.stopped)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Keep the loss of a step."""
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise DivergedError(
                f"training diverged: the loss at step {state.global_step} is {logs['loss']}; "
                "use a smaller lr"
            )
        self.history.steps.append(
            StepRecord(
                step=state.global_step,
                loss=float(logs["loss"]),
                lr=float(logs["learning_rate"]),
                grad_norm=float(logs.get("grad_norm", 0.0)),
                seconds=self._step_seconds,
                tokens=self.counted.tokens,
            )
        )

    def _evaluate(self, step: int, model: Any) -> None:
        self._clock.agree()
        began = self.box.elapsed
        metric, rankme = self.measure(model)
        self._clock.agree()
        took = self.box.elapsed - began
        self.history.evaluations.append(EvaluationRecord(step, metric, rankme, began, took))
        best = self.history.best
        if best is not None and best.step == step:
            self.best = changing_weights(model)

    def _show(self, share: float) -> None:
        percent = int(100 * share)
        if percent > self._percent:
            self._advance(percent - self._percent)
            self._percent = percent


def continue_from(loop: Loop, workplace: Path, identity: dict[str, Any], model: Any) -> Path | None:
    """Bring a loop to where its newest checkpoint was written; return that, None without one."""
    checkpoint = newest(workplace / CHECKPOINTS)
    if checkpoint is not None:
        before, best = read_progress(checkpoint)
        check_identity(before.identity, identity, workplace)
        if best and best.keys() != changing(model).keys():
            raise StoreError(
                f"the best weights in {checkpoint} are not all that training changes in this "
                "model; another version of fullrank wrote them: train with resume=False (--fresh) "
                "to start again"
            )
        loop.restore(before, best)
    return checkpoint


def run(trainer: Any, loop: Loop, checkpoint: Path | None, clock: SharedClock) -> None:
    """Train to the end, or until the user wants to stop.

    Raises
    ------
    StoreError
        When the checkpoint cannot be gone on from.
    KeyboardInterrupt
        When the user wanted to stop before the end; a checkpoint is there by then.
    """
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except FullrankError:
        raise
    except Exception as error:
        if checkpoint is None or loop.began:
            raise
        raise StoreError(
            f"{checkpoint} is damaged ({error}); train with resume=False to start again"
        ) from error
    if clock.stop and not loop.history.stopped:
        raise KeyboardInterrupt


def quiet_arguments(kind: Any, folder: Path, device: torch.device, **chosen: Any) -> Any:
    """Return a trainer's own settings with everything off that :class:`Loop` does instead.

    Parameters
    ----------
    kind
        Class of the settings.
    folder
        Of the run; checkpoints go below it.
    device
        Where the model is.
    chosen
        The other settings.
    """
    found = kind(
        output_dir=str(folder / CHECKPOINTS),
        dataloader_pin_memory=False,
        use_cpu=device.type == "cpu",
        # accelerate takes a process that is told its backend for one of several.
        ddp_backend="gloo" if device.type == "cpu" and Processes().count > 1 else None,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        **chosen,
    )
    # One GPU: DataParallel would split a batch, and with it the negatives of each query.
    if found.n_gpu > 1:
        found._n_gpu = 1
    return found


def changing(model: Any) -> Weights:
    """Trained parameters, and all buffers that belong to the model's state, tied ones once."""
    found: Weights = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        trained = tensor.requires_grad if isinstance(tensor, torch.nn.Parameter) else True
        if trained and id(tensor) not in seen and isinstance(tensor, torch.Tensor):
            seen.add(id(tensor))
            found[name] = tensor
    return found


def changing_weights(model: Any) -> Weights:
    """Copies, on the CPU, of everything that training changes."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in changing(model).items()
    }


@torch.no_grad()
def load_weights(model: Any, weights: Weights) -> None:
    """Write weights that :func:`changing_weights` took back into a model."""
    there = changing(model)
    for name, value in weights.items():
        there[name].copy_(value)


class WholeCheckpoints:
    """Mixin for a trainer: checkpoints are written aside, then renamed; they hold no code.

    Parameters
    ----------
    loop
        Our callback.
    identity
        What must be the same for a checkpoint to be continued.
    first
        Callbacks that change the model after a step, before ``loop`` measures and keeps it.
    """

    args: Any
    state: Any

    def __init__(
        self,
        *,
        loop: Loop,
        identity: dict[str, Any],
        first: Sequence[Any] = (),
        **arguments: Any,
    ) -> None:
        self._loop = loop
        self._identity = identity
        self._staging: Path | None = None
        super().__init__(callbacks=[*first, loop], **arguments)  # type: ignore[call-arg]
        self.remove_callback(PrinterCallback)  # type: ignore[attr-defined]

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging or super()._get_output_dir(trial))  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, processes = Path(self.args.output_dir), Processes()
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / f".writing-{self.state.global_step}"
        with processes.main_first() as main:
            if main:
                shutil.rmtree(self._staging, ignore_errors=True)
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            processes.wait()
            if processes.main:
                progress = self._loop.progress(self._identity)
                write_progress(self._staging / name, progress, self._loop.best)
                publish(self._staging / name, folder / name)
        finally:
            if processes.main:
                shutil.rmtree(self._staging, ignore_errors=True)
            self._staging = None
        processes.wait()
