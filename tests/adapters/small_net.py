"""The model that adapters are tried on, and what it is trained on; nothing of fullrank."""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

TARGETS = ["wide", "tall"]
KINDS = {"linear": nn.Linear, "conv1d": lambda width, out: Conv1D(out, width)}


class Net(nn.Module):
    """Tokens in, labels out; a wide and a tall layer to adapt."""

    def __init__(self, kind="linear", middle=20):
        super().__init__()
        self.embed = nn.Embedding(11, 12)
        self.wide, self.tall = KINDS[kind](12, middle), KINDS[kind](middle, 9)
        self.head = nn.Linear(9, 5)

    def forward(self, ids, labels=None):
        logits = self.head(self.tall(self.wide(self.embed(ids)).tanh()).tanh())
        if labels is None:
            return logits
        loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


def net(kind="linear", dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Net(kind, **options).to(dtype)


def samples(count=24, length=6):
    """Token ids and labels, a function of the ids that takes some learning."""
    ids = torch.randint(0, 11, (count, length), generator=torch.Generator().manual_seed(1))
    return {"ids": ids, "labels": (ids + ids.roll(1, 1)) % 5}
