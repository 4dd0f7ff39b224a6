"""`VERLTrainer`: TRL's GRPO (and RLOO) with VERL's shaping of advantages.

Everything else is TRL's: rewards, generation, clipping, PEFT, logging. After TRL has scored a
batch of responses, one teacher-forced forward pass gives their hidden states; what
:func:`~fullrank.spectra.rank_dynamics` says of them shapes the advantages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fullrank.core.errors import InputError, StoreError, require
from fullrank.core.files import atomic_write
from fullrank.core.modes import evaluating
from fullrank.rl.shaper import BonusOn, Ema, Mode, RankShaper
from fullrank.spectra import RankDynamics, rank_dynamics

require("trl", extra="rl")
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer  # noqa: E402

STATE = "rank_shaper.json"
"""File of the running means inside a checkpoint."""


@dataclass
class RankOptions:
    """What VERL adds to a trainer's settings; see :class:`~fullrank.rl.RankShaper`."""

    rank_stride: int = field(default=40, metadata={"help": "Tokens between two prefixes (s)."})
    rank_max_tokens: int | None = field(
        default=512, metadata={"help": "Last tokens that velocity and acceleration look at."}
    )
    rank_gain: float = field(default=2.0, metadata={"help": "Sharpness of the controller (g)."})
    rank_kappa: float = field(
        default=2.0, metadata={"help": "The bonus is at most |A| / kappa; above 1 no sign flips."}
    )
    rank_ema: float | str = field(
        default=0.3,
        metadata={"help": "Weight of the newest batch; official: 0.3, and rank_start=official."},
    )
    rank_aux_weight: float = field(default=1.0, metadata={"help": "Of the bonus; 0 turns it off."})
    rank_dynamic: bool = field(
        default=False, metadata={"help": "Let the weight fall as rewards in [-1, 1] rise."}
    )
    rank_mode: Mode = field(
        default="adaptive", metadata={"help": "adaptive, half or both; or PlanB, ..."}
    )
    rank_bonus_on: BonusOn = field(
        default="sequence", metadata={"help": "sequence, or last_token as the official code."}
    )
    rank_start: Ema = field(
        default="first_batch", metadata={"help": "How running means begin; or official."}
    )

    def __post_init__(self) -> None:
        """Say before training what does not fit.

        Raises
        ------
        InputError
            On values out of range.
        """
        getattr(super(), "__post_init__", lambda: None)()
        self.shaper()
        most = self.rank_max_tokens
        if self.rank_stride < 1 or (most is not None and most < 1):
            raise InputError(
                f"rank_stride={self.rank_stride}, rank_max_tokens={most}; expected at least 1"
            )

    def shaper(self) -> RankShaper:
        """Return a shaper of these settings.

        Raises
        ------
        InputError
            On values out of range.
        """
        return RankShaper(
            self.rank_gain,
            self.rank_kappa,
            self.rank_ema,  # type: ignore[arg-type]
            self.rank_aux_weight,
            dynamic=self.rank_dynamic,
            mode=self.rank_mode,
            bonus_on=self.rank_bonus_on,
            start=self.rank_start,
        )


@dataclass
class VERLConfig(RankOptions, GRPOConfig):  # type: ignore[misc]
    """GRPO's settings and VERL's (arXiv 2509.23808; defaults of the official launch script).

    Examples
    --------
    >>> VERLConfig(output_dir="run", rank_stride=20, report_to="none", bf16=False).rank_kappa
    2.0
    """


@dataclass
class VERLRLOOConfig(RankOptions, RLOOConfig):  # type: ignore[misc]
    """RLOO's settings and VERL's; the bonus goes to whole responses."""

    def __post_init__(self) -> None:
        """Refuse what RLOO has no place for: it has one advantage a response."""
        super().__post_init__()
        if self.rank_bonus_on != "sequence":
            raise InputError(
                f"rank_bonus_on={self.rank_bonus_on!r}; RLOO has one advantage a response, so that "
                "the bonus goes to 'sequence'"
            )


class _RankShaping:
    """Mixin for TRL's online trainers."""

    args: Any
    model: Any
    accelerator: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shaper = self.args.shaper()

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        out: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if not self.model.training or self.args.rank_aux_weight == 0:
            return out
        mask = out["completion_mask"]
        if "tool_mask" in out:
            mask = mask * out["tool_mask"]
        found = rank_dynamics(
            self._hidden_states(out), mask, self.args.rank_stride, self.args.rank_max_tokens
        )
        token_mask = mask if self.args.rank_bonus_on == "last_token" else None
        before = out["advantages"]
        out["advantages"] = self.shaper.shape(before, *found, mask=token_mask)
        self._remember(found, mask)
        return out

    def _remember(self, found: RankDynamics, mask: Tensor) -> None:
        """Update the running means with the responses of all processes, and log."""
        tokens = mask.sum(1).to(found.er)
        everyone = self.accelerator.gather(torch.stack([*found, tokens], dim=1))
        # A response without a token (cut off, and masked for it) says nothing.
        everyone = everyone[everyone[:, 3] > 0]
        metrics = self._metrics["train"]  # type: ignore[attr-defined]
        if not len(everyone):
            return
        scores = torch.tensor(metrics["reward"][-1:]) if self.args.rank_dynamic else None
        er, erv, era, _ = everyone.T
        self.shaper.update(er, erv, era, scores)
        for name, values in (("er", er), ("erv", erv), ("era", era)):
            metrics[f"rank/{name}"].append(values.mean().item())
        short = everyone[:, 3] <= 2 * self.args.rank_stride
        metrics["rank/short"].append(short.double().mean().item())
        for name, value in self.shaper.last_stats.items():
            gathered = self.accelerator.gather(value.to(self.accelerator.device))
            metrics[f"rank/{name}"].append(gathered.double().mean().item())

    @torch.no_grad()
    def _hidden_states(self, out: dict[str, Any]) -> Tensor:
        """``(B, C, d)`` last-layer states behind each token of the completions, dropout off."""
        ids = torch.cat([out["prompt_ids"], out["completion_ids"]], dim=1)
        mask = torch.cat([out["prompt_mask"], out["completion_mask"]], dim=1)
        length = out["completion_ids"].shape[1]
        run = self._through_trainer if self._is_sharded() else self._through_model
        size = self.args.per_device_train_batch_size
        with evaluating(self.model):
            parts = [
                run(ids[i : i + size], mask[i : i + size], length) for i in range(0, len(ids), size)
            ]
        return torch.cat(parts)

    def _is_sharded(self) -> bool:
        return bool(
            getattr(self, "is_fsdp_enabled", False) or getattr(self, "is_deepspeed_enabled", False)
        )

    def _decoder(self) -> nn.Module:
        model = self.accelerator.unwrap_model(self.model)
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        decoder: nn.Module = model.base_model
        return decoder

    def _through_model(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        found = self._decoder()(input_ids=ids, attention_mask=mask, use_cache=False)
        states: Tensor = found.last_hidden_state
        return states[:, -length - 1 : -1]

    def _through_trainer(self, ids: Tensor, mask: Tensor, length: int) -> Tensor:
        """Sharded parameters are whole only inside a forward pass of the wrapped model."""
        seen: list[Tensor] = []
        hook = self._decoder().register_forward_hook(
            lambda _, args, result: seen.append(result.last_hidden_state)
        )
        try:
            self._get_per_token_logps_and_entropies(  # type: ignore[attr-defined]
                self.model, ids, mask, length, batch_size=len(ids)
            )
        finally:
            hook.remove()
        # The trainer may have left out the last position already.
        states = seen[0]
        last = states.shape[1] - (1 if states.shape[1] == ids.shape[1] else 0)
        return states[:, last - length : last]

    # -- checkpoints ---------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # First of all: what makes a checkpoint one to go on from is written last.
        if self.args.should_save:
            step = self.state.global_step  # type: ignore[attr-defined]
            run = Path(self._get_output_dir(trial=trial))  # type: ignore[attr-defined]
            folder = run / f"checkpoint-{step}"
            folder.mkdir(parents=True, exist_ok=True)
            atomic_write(folder / STATE, json.dumps(self.shaper.state_dict()).encode())
        super()._save_checkpoint(model, trial)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        try:
            self.shaper.load_state_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(
                f"{path} cannot be read ({error}): the checkpoint is not one of this trainer, or "
                "damaged; train from the start instead"
            ) from error


class VERLTrainer(_RankShaping, GRPOTrainer):  # type: ignore[misc]
    """TRL's ``GRPOTrainer`` with VERL's shaping; every option of it keeps working.

    Logs ``rank/er``, ``rank/erv``, ``rank/era``, the controller's ``rank/beta``, the share of
    responses ``rank/rewarded`` and of deviations that are ``rank/saturated``, and the share of
    responses too ``rank/short`` for a velocity. Running means are saved in checkpoints.

    Parameters
    ----------
    args
        A :class:`VERLConfig`; the other arguments are ``GRPOTrainer``'s.

    Examples
    --------
    >>> trainer = VERLTrainer(model, reward, args=VERLConfig(output_dir="run"),
    ...                       train_dataset=prompts)  # doctest: +SKIP
    """


class VERLRLOOTrainer(_RankShaping, RLOOTrainer):  # type: ignore[misc]
    """TRL's ``RLOOTrainer`` with VERL's shaping; see :class:`VERLTrainer`."""
