"""A policy before and after: warmed up on solutions, and measured on problems it has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fullrank.core.modes import evaluating
from fullrank.training.rl_problems import RewardFunction, Row

_BATCH = 32  # solutions a step of the warm-up
_AT_ONCE = 128  # responses generated together
_IGNORED = -100  # label of tokens that are not learned


@dataclass(frozen=True)
class Solved:
    """What a policy gets right on the dev problems.

    Attributes
    ----------
    greedy
        Mean reward of the most likely response.
    mean
        Mean reward of sampled responses; None without samples.
    best
        Mean over problems of the best of its samples: ``pass@k`` for rewards of 0 and 1.
    samples
        k.
    """

    greedy: float
    mean: float | None
    best: float | None
    samples: int

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


def warm_up(
    model: Any, tokenizer: Any, rows: Sequence[Row], *, steps: int, lr: float, seed: int
) -> float:
    """Teach a model solutions by their tokens' likelihood; return the last steps' mean loss.

    AdamW with a linear decay; prompts are read, not learned.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    losses = []
    model.train()
    for _ in range(steps):
        picked = torch.randint(len(rows), (_BATCH,), generator=generator).tolist()
        batch = _batch(tokenizer, [rows[i] for i in picked], model.device)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _batch(tokenizer: Any, rows: Sequence[Row], device: torch.device) -> dict[str, torch.Tensor]:
    end = tokenizer.eos_token_id
    prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
    answers = [[*tokenizer(row["solution"])["input_ids"], end] for row in rows]
    longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.full((len(rows), longest), end)
    labels = torch.full((len(rows), longest), _IGNORED)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        length = len(prompt) + len(answer)
        ids[i, :length] = torch.tensor([*prompt, *answer])
        labels[i, len(prompt) : length] = torch.tensor(answer)
        mask[i, :length] = 1
    tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@torch.no_grad()
def measure(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    rewards: Sequence[RewardFunction],
    *,
    tokens: int,
    samples: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Solved:
    """Measure a policy on problems: the likeliest response, and several sampled ones.

    Parameters
    ----------
    tokens
        Of a response, at most.
    samples
        Responses sampled a problem, at ``temperature``; 0 for none.
    seed
        Of the sampling; the global generator is left as it was.
    """
    greedy = _rewards(model, tokenizer, rows, rewards, tokens, do_sample=False)
    if not samples:
        return Solved(_mean(greedy), None, None, 0)
    repeated = [row for row in rows for _ in range(samples)]
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        sampled = _rewards(
            model, tokenizer, repeated, rewards, tokens, do_sample=True, temperature=temperature
        )
    best = [max(sampled[i : i + samples]) for i in range(0, len(sampled), samples)]
    return Solved(_mean(greedy), _mean(sampled), _mean(best), samples)


def _rewards(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    rewards: Sequence[RewardFunction],
    tokens: int,
    **sampling: Any,
) -> list[float]:
    texts: list[str] = []
    with evaluating(model):
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            inputs = tokenizer(
                [row["prompt"] for row in part],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            inputs.pop("token_type_ids", None)
            if sampling["do_sample"]:
                sampling |= {"top_k": 0, "top_p": 1.0}
            found = model.generate(
                **inputs, max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id, **sampling
            )
            new = found[:, inputs["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
    columns = {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}
    prompts = [row["prompt"] for row in rows]
    each = [f(completions=texts, prompts=prompts, **columns) for f in rewards]
    return [sum(values) for values in zip(*each, strict=True)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
