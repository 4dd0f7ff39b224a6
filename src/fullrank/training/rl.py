"""`train_rl`: a language model trained from rewards, with VERL's shaping or without."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fullrank.core.errors import InputError, StoreError, require
from fullrank.core.files import atomic_write
from fullrank.core.models import load_model
from fullrank.core.table import Table
from fullrank.training.lm_data import byte_tokenizer, load_lm, read_tokenizer
from fullrank.training.quiet import own_randomness, quiet_libraries
from fullrank.training.results import versions
from fullrank.training.rl_config import RLRun
from fullrank.training.rl_measure import Solved, measure, warm_up
from fullrank.training.rl_problems import Problems, read_problems, reward_functions

RESULT = "rl.json"
_START = "start"
# For a small model on one machine; everything can be set in trainer.options.
_OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "num_generations": 8,
    "max_completion_length": 64,
    "learning_rate": 1e-4,
    "logging_steps": 1,
    "bf16": False,
    "beta": 0.0,
    "disable_tqdm": True,
}


@dataclass(frozen=True)
class TrainedPolicy:
    """A policy trained from rewards.

    Attributes
    ----------
    before, after
        What it solved of the dev problems.
    rewards
        Mean reward of each step's responses.
    config
        The run's settings.
    folder
        Where model, tokenizer, log and ``rl.json`` are.
    """

    before: Solved
    after: Solved
    rewards: list[float]
    config: RLRun
    folder: Path

    def table(self) -> Table:
        """What was solved before and after."""
        k = self.after.samples
        rows = [
            [name, solved.greedy, solved.mean, solved.best]
            for name, solved in (("before", self.before), ("after", self.after))
        ]
        columns = ["", "greedy reward", "sampled reward", f"best of {k}"]
        title = f"{self.config.data.dev_problems} dev problems"
        return Table(columns, rows, title=title, formats=dict.fromkeys(columns[1:], ".3f"))


def train_rl(config: RLRun, out: str | Path) -> TrainedPolicy:
    """Train a causal language model from rewards, as a run's settings say.

    Parameters
    ----------
    config
        Model, problems, rewards, trainer; see :class:`RLRun`.
    out
        Folder of the run. An interrupted one goes on from its newest checkpoint; a finished one
        is read. ``fullrank see run`` shows it, meanwhile too.

    Raises
    ------
    InputError
        On settings that do not fit together, a reward that cannot be imported, a folder that
        holds another run.
    StoreError
        On a damaged result.
    """
    require("trl", extra="rl")
    folder = Path(out)
    rewards = reward_functions(config.reward.functions)
    problems = read_problems(config.data, config.loop.seed)
    _claim(folder, config)
    if (folder / RESULT).is_file():
        return _finished(folder, config)
    with quiet_libraries(), own_randomness(), warnings.catch_warnings():
        # TRL uses names that the next transformers will not have; no user can help it.
        warnings.simplefilter("ignore", FutureWarning)
        arguments = _arguments(config, folder)
        model, tokenizer = _policy(config, folder, problems)

        def measured(policy: Any) -> Solved:
            return measure(
                policy,
                tokenizer,
                problems.dev,
                rewards,
                tokens=arguments.max_completion_length,
                samples=config.loop.samples,
                temperature=arguments.temperature,
                seed=config.loop.seed,
            )

        before = measured(model)
        trainer = _trainer(config, arguments, model, tokenizer, problems, rewards)
        _train(trainer, folder)
        curve = [r["reward"] for r in trainer.state.log_history if "reward" in r]
        after = measured(model)
        model.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
    trained = TrainedPolicy(before, after, curve, config, folder)
    values = {
        "version": 1,
        "config": config.as_dict(),
        "before": before.to_json(),
        "after": after.to_json(),
        "rewards": curve,
        "versions": versions(),
    }
    atomic_write(folder / RESULT, json.dumps(values, indent=1).encode())
    return trained


def _claim(folder: Path, config: RLRun) -> None:
    """Mark a new folder as this run's, or see that it is."""
    mark = folder / "run.json"
    if mark.is_file():
        if _read(mark) != config.as_dict():
            raise InputError(f"{folder} holds a run with other settings; give a new folder")
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} holds something else already; give a new folder")
    atomic_write(mark, json.dumps(config.as_dict(), indent=1).encode())


def _finished(folder: Path, config: RLRun) -> TrainedPolicy:
    values = _read(folder / RESULT)
    try:
        before, after = Solved(**values["before"]), Solved(**values["after"])
        return TrainedPolicy(before, after, values["rewards"], config, folder)
    except (KeyError, TypeError) as error:
        raise StoreError(f"{folder / RESULT} is damaged ({error}); give a new folder") from error


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StoreError(f"{path} is damaged ({error}); give a new folder") from error


def _policy(config: RLRun, folder: Path, problems: Problems) -> tuple[Any, Any]:
    """The model to start from and its tokenizer; a new one is taught once and kept."""
    section, device = config.model, config.loop.device
    start = folder / _START
    if section.config is not None and not start.is_dir():
        tokenizer = _padded(byte_tokenizer())
        torch.manual_seed(config.loop.seed)
        made = load_lm(None, section.config, tokenizer, "float32").to(device or _default_device())
        warm_up(
            made,
            tokenizer,
            problems.train,
            steps=section.warmup_steps,
            lr=section.warmup_lr,
            seed=config.loop.seed,
        )
        staging = folder / f".{_START}"
        shutil.rmtree(staging, ignore_errors=True)
        tokenizer.save_pretrained(str(staging))
        made.save_pretrained(str(staging))
        staging.rename(start)
    source = section.name or str(start)
    transformers = require("transformers", extra="hf")
    model = load_model(source, transformers.AutoModelForCausalLM.from_pretrained)
    # A model that was trained by next-token likelihood may have been saved without.
    model.config.use_cache = model.generation_config.use_cache = True
    return model.to(device or _default_device()), _padded(read_tokenizer(source))


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _padded(tokenizer: Any) -> Any:
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _classes(method: str) -> tuple[Any, Any]:
    """Configuration and trainer of a method."""
    from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    from fullrank.rl import VERLConfig, VERLRLOOConfig, VERLRLOOTrainer, VERLTrainer

    return {
        "verl": (VERLConfig, VERLTrainer),
        "grpo": (GRPOConfig, GRPOTrainer),
        "verl_rloo": (VERLRLOOConfig, VERLRLOOTrainer),
        "rloo": (RLOOConfig, RLOOTrainer),
    }[method]


def _arguments(config: RLRun, folder: Path) -> Any:
    kind, _ = _classes(config.trainer.method)
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(config.trainer.options) - known)
    if unknown:
        raise InputError(
            f"trainer.options {', '.join(unknown)}: {kind.__name__} has no such setting"
        )
    device = config.loop.device or _default_device()
    try:
        return kind(
            output_dir=str(folder),
            max_steps=config.loop.steps,
            seed=config.loop.seed,
            use_cpu=device == "cpu",
            save_strategy="steps",
            save_steps=config.loop.save_every,
            save_total_limit=1,
            report_to="none",
            **{**_OPTIONS, **config.trainer.options},
        )
    except (ValueError, TypeError) as error:
        raise InputError(f"trainer.options: {error}") from error


def _trainer(
    config: RLRun,
    arguments: Any,
    model: Any,
    tokenizer: Any,
    problems: Problems,
    rewards: list[Any],
) -> Any:
    from datasets import Dataset
    from transformers import PrinterCallback

    from fullrank.spectra import RunLogCallback

    _, kind = _classes(config.trainer.method)
    rows = [{n: v for n, v in row.items() if n != "solution"} for row in problems.train]
    trainer = kind(
        model,
        rewards,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[RunLogCallback(ranks_every=config.loop.ranks_every)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train(trainer: Any, folder: Path) -> None:
    """Train to the end, from the newest checkpoint if there is one."""
    from transformers import TrainerState

    newest = _newest(folder)
    if newest is not None:
        state = TrainerState.load_from_json(str(Path(newest) / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            # Only what comes after was interrupted; the trainer would take one more step.
            trainer._load_from_checkpoint(newest)
            trainer.state = state
            return
    trainer.train(resume_from_checkpoint=newest)


def _newest(folder: Path) -> str | None:
    """The whole checkpoint of most steps: its state is what the trainer writes last."""
    names = [p.parent.name for p in folder.glob("checkpoint-*/trainer_state.json")]
    steps = [int(found[1]) for name in names if (found := re.fullmatch(r"checkpoint-(\d+)", name))]
    return str(folder / f"checkpoint-{max(steps)}") if steps else None
