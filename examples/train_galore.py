"""Train a language model over bytes with GaLore, stop, resume bit by bit."""

import io
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fullrank.optim import GaLoreAdamW, param_groups

text = torch.frombuffer(bytearray(Path(torch.__file__).read_bytes()), dtype=torch.uint8).long()


def start() -> tuple[LlamaForCausalLM, GaLoreAdamW]:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # Linear layers are projected, the rest is plain AdamW; it prints which, and the memory.
    groups = param_groups(model, GaLoreAdamW, rank=32)
    return model, GaLoreAdamW(groups, lr=3e-3, update_proj_gap=20, scale=1.0)


def train(model: LlamaForCausalLM, optimizer: GaLoreAdamW, first: int, last: int) -> None:
    for step in range(first, last):
        draw = torch.Generator().manual_seed(step)
        places = torch.randint(len(text) - 64, (8,), generator=draw)
        ids = torch.stack([text[i : i + 64] for i in places.tolist()])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: {loss.item() / 0.6931:.3f} bits per byte")


steps = int(sys.argv[1]) if len(sys.argv) > 1 else 60
model, optimizer = start()
train(model, optimizer, 0, steps // 2)
kept = io.BytesIO()
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, kept)
train(model, optimizer, steps // 2, steps)

again, other = start()
state = torch.load(io.BytesIO(kept.getvalue()), weights_only=True)
again.load_state_dict(state["model"])
other.load_state_dict(state["optimizer"])
train(again, other, steps // 2, steps)
same = all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
print("resumed, and the same bit by bit:", same)
