"""The cheap refresh on gradients of a language model: as good as the SVD, or replaced by one."""

import pytest
import torch
from torch import nn

from fullrank.optim import FiraAdamW, GaLoreAdamW, param_groups

pytestmark = pytest.mark.data

CONTEXT, RANK = 32, 8


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(256, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 96, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 256)

    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        return self.head(self.blocks(self.embed(x), mask=mask, is_causal=True))


@pytest.fixture(scope="module")
def text(data_folder):
    found = (data_folder / "tinyshakespeare.txt").read_bytes()[:200_000]
    return torch.frombuffer(bytearray(found), dtype=torch.uint8).long()


def share_of_the_best(gradient, state):
    """Energy that the bases capture, relative to that of as many singular vectors."""
    small = gradient.double()
    if "basis_left" in state:
        small = state["basis_left"].double().T @ small
    if "basis_right" in state:
        small = small @ state["basis_right"].double().T
    if len({"basis_left", "basis_right"} & set(state)) == 2:
        # Of both sides the best is what the leading vectors of both keep.
        assert small.shape == (RANK, RANK)
    best = torch.linalg.svdvals(gradient.double())[:RANK].square().sum()
    return float(small.square().sum() / best)


@pytest.mark.parametrize("gap", [1, 10])
@pytest.mark.parametrize(("kind", "proj_type"), [(GaLoreAdamW, "full"), (FiraAdamW, "std")])
def test_a_refresh_keeps_the_energy_that_the_svd_keeps(text, kind, proj_type, gap, caplog):
    caplog.set_level("INFO", "fullrank.optim")
    torch.manual_seed(0)
    model = Model()
    options = {"update_proj_gap": gap, "refresh": "subspace", "proj_type": proj_type}
    groups = param_groups(model, kind, rank=RANK, verbose=False, **options)
    optimizer = kind(groups, lr=0.005)
    projected = [p for group in groups for p in group["params"] if optimizer.projects(p)]
    generator, losses, shares = torch.Generator().manual_seed(0), [], []
    steps = 1 + 12 * gap
    for t in range(steps):
        starts = torch.randint(0, len(text) - CONTEXT - 1, (8, 1), generator=generator)
        x = text[starts + torch.arange(CONTEXT + 1)]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if t % gap == 0:
            shares += [share_of_the_best(p.grad, optimizer.state[p]) for p in projected]
    assert losses[-1] < losses[0]
    assert len(shares) == 13 * len(projected)
    assert min(shares) >= 0.999
    # Both ways were taken, and it is told how often.
    assert sum(optimizer.refreshes.values()) == len(shares)
    assert optimizer.refreshes["iteration"] > 0
    fell_back = [record.args[0] for record in caplog.records if "decomposed" in record.message]
    assert optimizer.refreshes["decomposition"] == len(projected) + sum(fell_back)
    assert sum(fell_back) > 0
