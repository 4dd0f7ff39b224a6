"""The X-ray of a model: what it finds, compares, plans, and shows."""

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.core import (
    DEFAULT_ENCODER,
    InputError,
    PlanError,
    RankPlan,
    model_fingerprint,
    resolve_model,
)
from fullrank.core.rank_rules import Energy, Fixed, PerKind
from fullrank.spectra import MatrixSpectrum, Spectrum, XRay, effective_rank, xray


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.query = nn.Linear(12, 12)
        self.up = nn.Linear(12, 30, bias=False)


class Tower(nn.Module):
    def __init__(self, layers=3):
        super().__init__()
        self.words = nn.Embedding(50, 12)
        self.norm = nn.LayerNorm(12)
        self.layer = nn.ModuleList(Block() for _ in range(layers))
        self.pooler = nn.Linear(12, 5)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Tower()


def test_every_matrix_is_measured(model):
    found = xray(model, name="tower")
    assert list(found) == [
        "words",
        *(f"layer.{i}.{part}" for i in range(3) for part in ("query", "up")),
        "pooler",
    ]
    assert found["words"].kind == "embedding"
    assert found["layer.0.up"].shape == (30, 12)
    for name, matrix in found.items():
        weight = model.get_submodule(name).weight.detach().double()
        np.testing.assert_allclose(
            matrix.spectrum.values, torch.linalg.svdvals(weight), rtol=1e-7, atol=1e-9
        )
        assert matrix.spectrum.effective_rank == pytest.approx(effective_rank(weight), rel=1e-6)
        assert 0 < matrix.share <= 1
    assert found.fingerprint == model_fingerprint(model)
    assert found.parameters == sum(
        m.weight.numel() for m in model.modules() if isinstance(m, (nn.Linear, nn.Embedding))
    )
    assert "tower" in repr(found)


def test_the_model_is_not_changed(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    xray(model)
    assert model.training
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_wrappers_are_seen_through_and_shared_weights_are_looked_at_once(model):
    model.head = nn.Linear(12, 50, bias=False)
    model.head.weight = model.words.weight
    wrapped = nn.Sequential()
    wrapped.add_module("module", model)
    found = xray(wrapped)
    assert list(found) == list(xray(model))
    assert "head" not in found


def test_a_language_models_head_and_conv1d():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=16, n_head=2, vocab_size=40, n_positions=8, tie_word_embeddings=False
    )
    found = xray(transformers.GPT2LMHeadModel(config))
    assert found["lm_head"].kind == "head"
    assert found["transformer.h.0.mlp.c_fc"].shape == (64, 16)
    assert "lm_head" not in found.plan(rule=Fixed(2))
    assert "transformer.wte" not in found.plan(rule=Fixed(2))


def test_layers_of_two_factors(model):
    from fullrank.compress import LowRankLinear

    torch.manual_seed(0)
    factored = LowRankLinear(12, 30, rank=4)
    model.layer[0].up = factored
    found = xray(model)["layer.0.up"]
    assert found.rank == 4
    assert found.shape == (30, 12)
    assert found.parameters == 4 * 42
    expected = torch.linalg.svdvals(factored.second.double() @ factored.first.double())[:4]
    np.testing.assert_allclose(found.spectrum.values[:4], expected.detach(), rtol=1e-9)
    assert not found.spectrum.values[4:].any()
    assert "layer.0.up" not in xray(model).plan()


@pytest.mark.parametrize("threads", [1, 3])
def test_workers_give_the_same_and_leave_threads_alone(model, threads):
    before = torch.get_num_threads()
    expected = xray(model)
    torch.set_num_threads(threads)
    try:
        assert xray(model) == expected
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(model, dtype):
    found = xray(model.to(dtype))
    weight = model.pooler.weight.detach().double()
    assert found["pooler"].spectrum.effective_rank == pytest.approx(effective_rank(weight))


def test_a_zero_matrix_has_no_rank(model):
    nn.init.zeros_(model.pooler.weight)
    found = xray(model)
    assert found["pooler"].share == 0
    assert found["pooler"].measures()["r90"] == 0
    assert found.plan()["pooler"].rank is None
    assert "pooler" in found.to_html()
    assert found.compare(found).rows[-1][-1] == 0


def test_include(model):
    assert list(xray(model, include="*.query")) == [f"layer.{i}.query" for i in range(3)]
    with pytest.raises(InputError, match="no matrix is named like"):
        xray(model, include=["*.value"])


def test_models_that_cannot_be_looked_into(model):
    with pytest.raises(InputError, match="no linear layer"):
        xray(nn.LayerNorm(3))
    with pytest.raises(InputError, match="accuracy"):
        xray(model, accuracy="quick")
    with torch.device("meta"):
        hollow = Tower()
    with pytest.raises(InputError, match="meta device"):
        xray(hollow)
    model.layer[1].query.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match=r"layer\.1\.query.*NaN"):
        xray(model)


def test_table(model):
    table = xray(model, name="tower").table()
    assert table.columns == [
        "matrix",
        "shape",
        "effective rank",
        "share",
        "stable rank",
        "r90",
        "r95",
        "r99",
    ]
    assert len(table.rows) == 8
    assert "| layer.0.up | 30 × 12 |" in table.markdown()


def test_sampled_spectra_say_how_far_they_may_be_off(monkeypatch):
    from fullrank.spectra import measuring

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 6))
    exact = xray(model)
    assert xray(model, accuracy="sampled") == exact  # too small for sampling to pay
    monkeypatch.setattr(measuring, "sampling_pays", lambda shape: min(shape) > 100)
    found = xray(model, accuracy="sampled", seed=1)
    assert found == xray(model, accuracy="sampled", seed=1)
    assert found["1"] == exact["1"]
    for name, value in found["0"].measures().items():
        assert found["0"].margins[name] > 0
        truth = exact["0"].measures()[name]
        assert abs(value - truth) <= 2 * found["0"].margins[name]
        assert value == pytest.approx(truth, rel=0.1)
    table = found.table()
    assert table.columns[3] == "±"
    assert table.rows[1][3] is None
    assert "±" in found.to_html()
    assert XRay.from_json(found.to_json()) == found


def test_compare(model):
    before = xray(model, name="before")
    with torch.no_grad():
        model.pooler.weight.mul_(1.5)
    table = before.compare(xray(model, name="after"))
    moved = {row[0]: row[-1] for row in table.rows}
    assert moved["pooler"] == pytest.approx(0.5)
    assert moved["words"] == 0
    assert table.title == "before and after"
    with pytest.raises(InputError, match="different architectures"):
        before.compare(xray(nn.Sequential(nn.Linear(2, 2))))
    with pytest.raises(InputError, match="in the other"):
        before.compare(XRay([MatrixSpectrum("pooler", "linear", (2, 2), Spectrum([1.0, 1.0]))]))


def test_plans_apply_to_the_model_they_were_made_on(model):
    found = xray(model)
    for purpose in ("factor", "optimizer", "adapter"):
        plan = found.plan(purpose, Energy(0.5))
        assert plan.purpose == purpose
        assert plan.source == "weight"
        assert set(plan) == set(found) - {"words"}
        assert set(plan.check(model, purpose)) <= set(plan)
    with pytest.raises(PlanError):
        found.plan().check(Tower(layers=2), "factor")
    assert RankPlan.from_json(found.plan().to_json()) == found.plan()


def test_plan_ranks_follow_the_rule(model):
    found = xray(model)
    plan = found.plan("adapter", Energy(0.9), include="*.query")
    assert {n: e.rank for n, e in plan.items()} == {
        f"layer.{i}.query": found[f"layer.{i}.query"].spectrum.energy_rank(0.9) for i in range(3)
    }
    assert "Energy(tau=0.9)" in plan["layer.0.query"].reason
    factors = found.plan("factor", Fixed(10))
    assert factors["layer.0.query"].rank is None
    assert "saves nothing" in factors["layer.0.query"].reason
    kinds = found.plan("optimizer", PerKind({"*.up": 3}), exclude="pooler")
    assert kinds["layer.1.up"].rank == 3
    assert kinds["layer.1.query"].rank is None
    assert "pooler" not in kinds


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"purpose": "pruning"}, "purpose"),
        ({"include": "*.value"}, "named like"),
        ({"exclude": ["words"]}, "named like"),
        ({"exclude": "*"}, "left to plan"),
    ],
)
def test_plans_that_cannot_be_made(model, arguments, says):
    with pytest.raises(InputError, match=says):
        xray(model).plan(**arguments)


def test_json_round_trip(model):
    found = xray(model, name="tower")
    again = XRay.from_json(found.to_json())
    assert again == found
    assert again.plan() == found.plan()
    assert again != xray(Tower())


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not an X-ray"),
        ("[]", "not an X-ray"),
        ('{"format": 1, "matrices": [{}]}', "not an X-ray"),
        ('{"format": 99}', "upgrade"),
        ('{"format": 1, "matrices": [], "fingerprint": "", "model": ""}', "no matrices"),
    ],
)
def test_json_of_something_else(text, says):
    with pytest.raises(InputError, match=says):
        XRay.from_json(text)


class Page(HTMLParser):
    """Collects what a strict reader objects to."""

    def __init__(self):
        super().__init__()
        self.open, self.bad, self.links = [], [], []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        for name, value in attributes:
            if name.startswith("on") or name == "style" or tag in ("script", "iframe", "object"):
                self.bad.append((tag, name))
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page_is_whole_self_contained_and_scriptless(model, tmp_path):
    found = xray(model, name="tower")
    path = found.to_html(tmp_path / "deep" / "xray.html")
    text = path.read_text(encoding="utf-8")
    assert text == found.to_html()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.bad == []
    assert page.links[0] == "data:,"
    assert set(page.links[1:]) == {f"#m{i}" for i in range(len(found))}
    assert "default-src 'none'; style-src 'sha256-" in text
    assert "prefers-color-scheme:dark" in text
    assert all(name in text for name in found)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)


def test_page_allows_exactly_its_style(model):
    import base64
    import hashlib

    text = xray(model).to_html()
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in text


def test_names_are_escaped():
    evil = '<script>alert("x")</script>&'
    matrices = [
        MatrixSpectrum(f"layer.0.{evil}", "linear", (4, 4), Spectrum([4.0, 2.0, 1.0, 0.5])),
        MatrixSpectrum(evil, "linear", (4, 4), Spectrum([4.0, 2.0, 1.0, 0.5])),
    ]
    text = XRay(matrices, model=evil).to_html()
    assert "<script" not in text
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.bad == []


def test_pictures_are_well_formed_on_their_own(model):
    found = xray(model)
    for svg in (found.heatmap_svg(), found.energy_svg(), found.spectrum_svg("layer.0.query")):
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg")
        assert root.get("aria-label")
    cells = ElementTree.fromstring(found.heatmap_svg()).iter("{http://www.w3.org/2000/svg}g")
    assert sum(1 for _ in cells) == len(found)


def test_one_by_one_and_single_matrices():
    found = xray(nn.Sequential(nn.Linear(1, 1)))
    assert found["0"].share == 1
    assert found.to_html()
    assert xray(nn.Linear(3, 4), name="layer").to_html()


def test_the_embedded_encoder():
    transformers = pytest.importorskip("transformers")
    encoder = transformers.AutoModel.from_pretrained(resolve_model(DEFAULT_ENCODER))
    found = xray(encoder)
    assert len(found) == 40
    assert found["embeddings.word_embeddings"].shape == (30522, 384)
    weight = encoder.embeddings.word_embeddings.weight.detach().double()
    assert found["embeddings.word_embeddings"].spectrum.effective_rank == pytest.approx(
        effective_rank(weight), rel=1e-9
    )
    assert 0.7 < found.mean_share < 0.85
    assert found.model == "BertModel"
