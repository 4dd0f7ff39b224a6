"""Put an adapter on an encoder where its inputs vary most, train it, save it as a plain LoRA."""

import sys
from pathlib import Path

import torch
from transformers import AutoModel, AutoTokenizer

from fullrank.adapters import adapt, save_as_lora
from fullrank.core import DEFAULT_ENCODER, resolve_model
from fullrank.datasets import pydocs

out = Path(sys.argv[1] if len(sys.argv) > 1 else "adapter")
name = resolve_model(DEFAULT_ENCODER)
tokenizer, base = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name)

train = pydocs().split("train")
pairs = [
    (query, train.corpus[next(iter(train.qrels[i]))].contents)
    for i, query in list(train.queries.items())[:64]
]


def tokens(texts):
    return tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")


calibration = [dict(tokens(q for q, _ in pairs[i : i + 16])) for i in range(0, 64, 16)]
model = adapt(base, "eva", data=calibration, rank=8)
model.print_trainable_parameters()


def embed(texts):
    inputs = tokens(texts)
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=3e-4)
for step in range(4):
    batch = pairs[16 * step : 16 * step + 16]
    # Each query's own document among those of the batch.
    scores = embed(q for q, _ in batch) @ embed(d for _, d in batch).T / 0.05
    loss = torch.nn.functional.cross_entropy(scores, torch.arange(len(batch)))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
save_as_lora(model, out)
print(f"{out} loads with plain PEFT: PeftModel.from_pretrained(base, {str(out)!r})")
