"""What initialising adapters of the embedded encoder costs: EVA and LoRA-GA beside PEFT's own.

    python benchmarks/adapters_init.py            # 8 batches of 16 x 64 tokens, 3 rounds

All 36 linear layers of the encoder, rank 8; the ways take turns, CPU time, medians. Captured
variance: share of the (centred) input variance over all batches that the layers' ``A`` span, mean
and worst layer; ``exact`` is the most that is possible at these ranks.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
from sentence_transformers import SentenceTransformer

from fullrank.adapters import eva, lora_ga
from fullrank.core import DEFAULT_ENCODER, Table, resolve_model
from fullrank.core.capture import capture
from fullrank.datasets import pydocs

TARGETS = r"encoder\.layer\..*\.(query|key|value|dense)"
RANK = 8


def batches(count: int) -> tuple[Any, list[dict[str, torch.Tensor]]]:
    encoder = SentenceTransformer(resolve_model(DEFAULT_ENCODER), device="cpu")
    texts = pydocs().corpus.contents[:: max(1, 3500 // (16 * count))]
    found = []
    for i in range(count):
        rows = encoder.tokenizer(
            list(texts[16 * i : 16 * (i + 1)]),
            padding="max_length",
            truncation=True,
            max_length=64,
            return_tensors="pt",
        )
        found.append({k: rows[k] for k in ("input_ids", "attention_mask")})
    return encoder[0].auto_model.float(), found


def config(rho: float | None) -> peft.LoraConfig:
    options = (
        {} if rho is None else {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=rho)}
    )
    return peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, **options)


def theirs(base: Any, data: list, rho: float) -> Any:
    model = peft.get_peft_model(base, config(rho), low_cpu_mem_usage=True)
    peft.initialize_lora_eva_weights(model, data, show_progress_bar=False)
    return model


def ours(base: Any, data: list, rho: float) -> Any:
    model = peft.get_peft_model(base, config(rho), low_cpu_mem_usage=True)
    eva.initialize(model, data, progress=False)
    return model


def loss_fn(model: Any, batch: dict) -> torch.Tensor:
    """Any loss that reaches every layer: embeddings of two halves apart."""
    hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    scores = 20 * pooled[:8] @ pooled[8:].T
    return torch.nn.functional.cross_entropy(scores, torch.arange(8))


def ga_ours(base: Any, data: list) -> Any:
    return lora_ga.initialize(base, data, config(None), loss_fn=loss_fn, progress=False)


def ga_theirs(base: Any, data: list) -> Any:
    options = peft.LoraConfig(
        r=RANK,
        lora_alpha=RANK,
        target_modules=TARGETS,
        init_lora_weights="lora_ga",
        lora_ga_config=peft.LoraGAConfig(),
    )

    def step() -> None:
        for batch in data[:8]:
            base.zero_grad()
            loss_fn(base, batch).backward()

    peft.tuners.lora.preprocess_loraga(base, options, step)
    return peft.get_peft_model(base, options)


def captured(model: Any, data: list) -> tuple[float, float]:
    """Mean and worst share of the input variance that the layers' A span."""
    layers = {
        name: module
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    with torch.no_grad(), model.disable_adapter():
        for batch in data:
            mask = batch["attention_mask"].bool()
            with capture(layers, lambda n, x, m=mask: seen[n].append(x[m].double()), "input"):
                model(**batch)
    shares = []
    for name, layer in layers.items():
        x = torch.cat(seen.pop(name))
        x = x - x.mean(0)
        q = torch.linalg.qr(layer.lora_A["default"].weight.detach().double().T).Q
        most = torch.linalg.svdvals(x)[: q.shape[1]].square().sum()
        shares.append(float((x @ q).square().sum() / most))
    return statistics.fmean(shares), min(shares)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    base, data = batches(args.batches)
    ways: dict[str, Callable[[Any], Any]] = {
        "EVA, rho 1: PEFT": lambda m: theirs(m, data, 1.0),
        "EVA, rho 1: fullrank": lambda m: ours(m, data, 1.0),
        "EVA, rho 2: PEFT": lambda m: theirs(m, data, 2.0),
        "EVA, rho 2: fullrank": lambda m: ours(m, data, 2.0),
        "LoRA-GA: PEFT": lambda m: ga_theirs(m, data),
        "LoRA-GA: fullrank": lambda m: ga_ours(m, data),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    quality: dict[str, tuple[float, float] | None] = {}
    for number in range(args.rounds):
        for name, way in ways.items():
            model = copy.deepcopy(base)
            began = time.process_time()
            made = way(model)
            seconds[name].append(time.process_time() - began)
            if not number:
                quality[name] = captured(made, data) if name.startswith("EVA") else None
    rows = []
    for name, taken in seconds.items():
        other = seconds[name.partition(":")[0] + ": PEFT"]
        mean, worst = quality[name] or (None, None)
        took = statistics.median(taken)
        rows.append([name, took, took / statistics.median(other), mean, worst])
    columns = ["way", "CPU s", "of PEFT's", "variance of the most possible", "worst layer"]
    formats = {"CPU s": ".1f", "of PEFT's": ".2f", columns[3]: ".4f", "worst layer": ".4f"}
    title = f"{args.batches} batches of 16 x 64, median of {args.rounds} rounds"
    print(Table(columns, rows, title, formats).markdown())


if __name__ == "__main__":
    main()
