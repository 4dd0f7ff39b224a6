"""`model_report`: two models side by side, inputs, suggested plans, and the page of it all."""

import re

import pytest
import torch
from torch import nn

from fullrank.compress import LowRankLinear, factorize
from fullrank.core import InputError, RankPlan
from fullrank.core.plan import PlanEntry
from fullrank.spectra import Spectrum, model_report, xray
from fullrank.spectra.inputs import input_spectra, token_batches
from fullrank.spectra.planning_suggestions import suggestions
from fullrank.training.lm_data import byte_tokenizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.layer = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}) for _ in range(2)
        )

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        for part in self.layer:
            x = x + part["down"](part["up"](x).relu())
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def shrunk(model, rank):
    """A copy whose first `up` is its best approximation of a rank, in two factors."""
    copy = Net()
    copy.load_state_dict(model.state_dict())
    dense = copy.layer[0]["up"]
    U, S, Vh = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    factored = LowRankLinear(16, 24, rank=rank)
    with torch.no_grad():
        factored.first.copy_(Vh[:rank])
        factored.second.copy_(U[:, :rank] * S[:rank])
    copy.layer[0]["up"] = factored
    return copy


def test_a_shrunk_layer_keeps_its_leading_subspace(model):
    found = model_report(model, shrunk(model, 5), against_name="small", rank=12)
    overlap = found.overlaps["layer.0.up"]
    assert overlap.rank == 5  # no more than it stores
    assert overlap.left_share == pytest.approx(1, abs=1e-6)
    assert overlap.right_share == pytest.approx(1, abs=1e-6)
    assert found.overlaps["layer.1.up"].rank == 12
    assert found.other["layer.0.up"].rank == 5
    assert found.flaws["layer.0.up"].dead == 0
    reverse = model_report(shrunk(model, 5), model)
    assert reverse.overlaps["layer.0.up"].rank <= 5
    assert reverse.flaws["layer.0.up"].dead == 0


def test_what_moved_is_seen(model):
    tuned = Net()
    tuned.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    with torch.no_grad():
        tuned.layer[1]["down"].weight.copy_(torch.randn(16, 24))
    found = model_report(model, tuned, rank=4)
    shares = {row[0]: row[2] for row in found.overlap_table().rows}
    assert shares["layer.1.down"] < 0.8
    assert min(v for n, v in shares.items() if n != "layer.1.down") > 1 - 1e-6


def test_layers_that_keep_the_transpose():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=8)
    model, other = (transformers.GPT2LMHeadModel(config) for _ in range(2))
    other.load_state_dict(model.state_dict())
    one, two = (m.transformer.h[0].mlp.c_fc.weight.data for m in (model, other))
    two.copy_(torch.linalg.qr(torch.randn(16, 16))[0] @ one)  # stored (in, out): inputs turn
    model.transformer.h[0].mlp.c_fc.weight.data[:, 3] = 0
    square = "transformer.h.0.attn.c_proj"
    plan = RankPlan({square: PlanEntry((16, 16), 4)})
    found = model_report(model, factorize(other, plan), rank=4)
    turned = found.overlaps["transformer.h.0.mlp.c_fc"]
    assert turned.shape == (64, 16)
    assert turned.left_share > 0.9 > turned.right_share
    assert found.overlaps[square].left_share == pytest.approx(1, abs=1e-5)
    flaws = found.flaws["transformer.h.0.mlp.c_fc"]
    assert (flaws.rows.zeros, flaws.columns.zeros) == (1, 0)


def test_dead_directions_of_either_model(model):
    pruned = Net()
    pruned.load_state_dict(model.state_dict())
    with torch.no_grad():
        pruned.layer[1]["down"].weight[3] = 0
    found = model_report(model, pruned, name="whole", against_name="pruned")
    assert [row[:4] for row in found.flaw_table().rows] == [["pruned", "layer.1.down", 1, 1]]
    alone = model_report(pruned).flaw_table()
    assert (alone.columns[0], alone.rows[0][0]) == ("matrix", "layer.1.down")


def test_models_that_do_not_fit(model):
    with pytest.raises(InputError, match="different architectures"):
        model_report(model, nn.Sequential(nn.Linear(3, 3)))


def test_inputs_leave_padding_out(model):
    ids = torch.randint(0, 50, (4, 7))
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 3:] = 0
    model.train()
    found = input_spectra(model, [{"input_ids": ids, "attention_mask": mask}])
    rows = model.words(ids)[mask.bool()]
    expected = Spectrum(rows.detach())
    assert found["layer.0.up"].values == pytest.approx(expected.values, rel=1e-6)
    assert list(found) == ["layer.0.up", "layer.0.down", "layer.1.up", "layer.1.down"]
    assert model.training
    halves = [{"input_ids": ids[:1], "attention_mask": mask[:1]}]
    halves.append({"input_ids": ids[1:], "attention_mask": mask[1:]})
    streamed = input_spectra(model, halves)
    for name, spectrum in found.items():
        assert streamed[name].values == pytest.approx(spectrum.values, rel=1e-6, abs=1e-5)
    with pytest.warns(UserWarning, match="3 samples of width 16"):
        few = input_spectra(model, [{"input_ids": ids[:1, :3]}])
    assert len(few["layer.0.up"]) == 3
    with pytest.raises(InputError, match="none of the chosen modules ran"):
        input_spectra(model, [])
    with pytest.raises(InputError, match="no modules were chosen"):
        input_spectra(nn.Embedding(4, 3), [])


def test_texts_become_batches():
    batches = token_batches(byte_tokenizer(), ["a" * 2500, "bc", " "], samples=3, limit=40, size=2)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(2, 40), (1, 40)]
    with pytest.raises(InputError, match="no text"):
        token_batches(byte_tokenizer(), [" "], samples=3)


def test_suggestions_keep_their_budgets(model):
    found = suggestions(xray(model))
    assert set(found) == {"factor", "adapter", "optimizer"}
    for purpose, suggestion in found.items():
        assert suggestion.plan.purpose == purpose
    ranks = [entry.rank for entry in found["optimizer"].plan.values()]
    assert sum(ranks) / len(ranks) == pytest.approx(4, abs=0.5)
    with pytest.raises(InputError, match="left to plan"):
        suggestions(xray(nn.Embedding(9, 4)))


def test_the_page_says_it_all(model, tmp_path):
    with torch.no_grad():
        model.layer[1]["up"].weight[3] = model.layer[1]["up"].weight[0]
    inputs = input_spectra(model, [{"input_ids": torch.arange(50)[None]}])
    report = model_report(
        model, shrunk(model, 5), name="base", against_name="small", activations=inputs
    )
    text = report.to_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "X-ray of base and small" in text
    assert "lowest linear layer" in text
    assert "over 4 linear layers" in text
    assert "row 3 like 0" in text
    assert "What flows through the layers" in text
    assert "What both models share" in text
    assert text.count('class="sheet"') == len(report.xray)
    links = set(re.findall(r'href="(#m\d+)"', text))
    assert {f"#{place}" for place in re.findall(r'class="spot" id="(m\d+)"', text)} == links
    assert "<script" not in text


def test_a_model_without_anything_to_plan():
    text = model_report(nn.Sequential(nn.Embedding(9, 8))).to_html()
    assert "Ranks to start from" not in text
    assert "lowest matrix" in text
