"""EVA against PEFT and the official code, and what exact moments promise beyond them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.adapters import eva
from fullrank.adapters.eva_components import GramComponents, IncrementalComponents
from fullrank.core.errors import InputError

peft = pytest.importorskip("peft")

REFERENCE = Path(__file__).parents[1] / "reference" / "eva"
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj")
OWNER = {"k_proj": "q_proj", "v_proj": "q_proj"}


def load(name):
    return dict(np.load(REFERENCE / f"{name}.npz"))


@pytest.mark.parametrize("name", ["ipca_n24_k6", "ipca_n40_k9"])
def test_incremental_pca_is_the_official_one(name):
    case = load(name)
    count = len(case["meta_sizes"])
    width = case["X_0"].shape[1]
    pca = IncrementalComponents(width, int(case["meta_k"]), dtype=torch.float64)
    gram = GramComponents(width, int(case["meta_k"]), center=True)
    raw = GramComponents(width, int(case["meta_k"]), center=False)
    for i in range(count):
        x = torch.from_numpy(case[f"X_{i}"])
        for each in (pca, gram, raw):
            each.update(x)
        vectors, values, ratios = (t.numpy() for t in pca.solve())
        np.testing.assert_allclose(vectors, case[f"components_{i}"], atol=1e-9)
        np.testing.assert_allclose(values, case[f"singular_values_{i}"], rtol=1e-9)
        np.testing.assert_allclose(ratios, case[f"evr_{i}"], rtol=1e-9)
        np.testing.assert_allclose(pca.mean.numpy(), case[f"mean_{i}"], atol=1e-9)
        np.testing.assert_allclose(pca.variance.numpy(), case[f"var_{i}"], atol=1e-9)
    everything = torch.from_numpy(np.concatenate([case[f"X_{i}"] for i in range(count)]))
    for found, data in ((gram, everything - everything.mean(0)), (raw, everything)):
        vectors, values, ratios = found.solve()
        _, exact, right = torch.linalg.svd(data, full_matrices=False)
        torch.testing.assert_close(values, exact[: len(values)], rtol=1e-6, atol=1e-9)
        same = (vectors * right[: len(vectors)]).sum(1).abs()
        torch.testing.assert_close(same, torch.ones_like(same), rtol=0, atol=1e-6)
        share = exact.square()[: len(values)] / exact.square().sum()
        torch.testing.assert_close(ratios, share, rtol=1e-6, atol=1e-12)


class Toy(nn.Module):
    """Layers that are each given their own recorded input."""

    def __init__(self, case):
        super().__init__()
        for name in NAMES:
            width = case[f"x_{OWNER.get(name, name)}_0"].shape[1]
            setattr(self, name, nn.Linear(width, 48))

    def forward(self, **inputs):
        return sum(getattr(self, n)(inputs[OWNER.get(n, n)]).sum() for n in NAMES)


def toy(case, **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=int(case["meta_r"]),
        lora_alpha=int(case["meta_alpha"]),
        target_modules=list(NAMES),
        init_lora_weights="eva",
        eva_config=peft.EvaConfig(
            rho=float(case["meta_rho"]),
            tau=float(case["meta_tau"]),
            whiten=bool(case["meta_whiten"]),
        ),
        **options,
    )
    model = peft.get_peft_model(Toy(case), config)
    batches = [
        {name: torch.from_numpy(case[f"x_{name}_{b}"]) for name in NAMES if name not in OWNER}
        for b in range(int(case["meta_n_batches"]))
    ]
    return model, batches


def projector(rows):
    q = torch.linalg.qr(rows.double().T).Q
    return q @ q.T


@pytest.mark.parametrize("name", ["toy_rho1", "toy_rho2", "toy_rho2_whiten"])
def test_the_incremental_way_ends_where_peft_does(name):
    case = load(name)
    model, batches = toy(case)
    report = eva.initialize(model, batches, method="ipca", max_batches=200, progress=False)
    # PEFT runs once more, to find equal inputs.
    assert report.batches + 1 == int(case["peft_n_forwards"])
    assert report.unconverged == ()
    for layer in NAMES:
        assert report.ranks[layer] == int(case[f"peft_rank_{layer}"])
        module = model.base_model.model.get_submodule(layer)
        found = module.lora_A["default"].weight.detach()
        expected = torch.from_numpy(case[f"peft_A_{layer}"])
        torch.testing.assert_close(projector(found), projector(expected), rtol=0, atol=1e-4)
        assert module.scaling["default"] == pytest.approx(float(case[f"peft_scaling_{layer}"]))
        assert (module.lora_B["default"].weight == 0).all()
        if f"peft_evr_{layer}" in case:
            np.testing.assert_allclose(report.ratios[layer], case[f"peft_evr_{layer}"], rtol=2e-3)
    assert sum(report.ranks.values()) == len(NAMES) * int(case["meta_r"])


def test_whitening_divides_once():
    case = load("toy_rho2_whiten")
    model, batches = toy(case)
    report = eva.initialize(model, batches, method="ipca", max_batches=200, progress=False)
    for layer in NAMES:
        rows = model.base_model.model.get_submodule(layer).lora_A["default"].weight.detach()
        sizes = torch.from_numpy(case[f"peft_sv_{OWNER.get(layer, layer)}"])
        expected = sizes[: report.ranks[layer]] ** -0.5
        torch.testing.assert_close(rows.norm(dim=1), expected.float(), rtol=1e-3, atol=0)


def test_exact_moments_do_not_depend_on_batches():
    case = load("toy_rho2")
    results = []
    for arrange in (lambda b: b, lambda b: b[::-1], lambda b: [joined(b)]):
        model, batches = toy(case)
        report = eva.initialize(model, arrange(batches), progress=False)
        weights = [
            model.base_model.model.get_submodule(n).lora_A["default"].weight.detach() for n in NAMES
        ]
        results.append((report.ranks, weights))
    for ranks, weights in results[1:]:
        assert ranks == results[0][0]
        for a, b in zip(weights, results[0][1], strict=True):
            torch.testing.assert_close(projector(a), projector(b), rtol=0, atol=1e-6)


def joined(batches):
    return {name: torch.cat([b[name] for b in batches]) for name in batches[0]}


def test_exact_components_explain_more_than_incremental_ones():
    case = load("toy_rho1")
    explained = {}
    for method in ("gram", "ipca"):
        model, batches = toy(case)
        report = eva.initialize(model, batches, method=method, max_batches=100, progress=False)
        everything = joined(batches)
        total = 0.0
        for layer in NAMES:
            x = everything[OWNER.get(layer, layer)].double()
            x = x - x.mean(0)
            rows = model.base_model.model.get_submodule(layer).lora_A["default"].weight.detach()
            total += float((x @ projector(rows)).square().sum() / x.square().sum())
        explained[method] = total / len(NAMES)
        if method == "gram":
            assert np.mean(list(report.explained.values())) == pytest.approx(total / len(NAMES))
    assert explained["gram"] >= explained["ipca"] - 1e-12


def test_the_output_is_that_of_the_base_model_and_survives_saving(tmp_path):
    case = load("toy_rho2")
    model, batches = toy(case)
    with model.disable_adapter():
        base = model(**batches[0])
    report = eva.initialize(model, batches, progress=False)
    assert torch.equal(model(**batches[0]), base)
    for layer in NAMES:
        module = model.base_model.model.get_submodule(layer)
        assert module.scaling["default"] == pytest.approx(case["meta_alpha"] / case["meta_r"])
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(Toy(case), tmp_path)
    assert torch.equal(again(**batches[0]), model(**batches[0]))
    plan = report.plan
    assert plan.purpose == "adapter"
    assert {n: e.rank for n, e in plan.items()} == {n: r or None for n, r in report.ranks.items()}


def test_prompt_tokens_and_padding_do_not_count():
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 8)

        def forward(self, x, attention_mask=None, labels=None):
            return self.fc(x)

    x = torch.randn(4, 10, 6)
    mask = torch.ones(4, 10, dtype=torch.long)
    mask[:, 8:] = 0
    labels = torch.zeros(4, 10, dtype=torch.long)
    labels[:, :3] = -100
    batch = {"x": x, "attention_mask": mask, "labels": labels}

    def run(**changes):
        options = peft.EvaConfig(rho=1.0, **changes)
        config = peft.LoraConfig(
            r=2, target_modules=["fc"], init_lora_weights="eva", eva_config=options
        )
        model = peft.get_peft_model(Model(), config)
        eva.initialize(model, [batch], progress=False)
        return model.base_model.model.fc.lora_A["default"].weight.detach()

    def exact(rows):
        centred = (rows - rows.mean(0)).double()
        return projector(torch.linalg.svd(centred).Vh[:2])

    torch.testing.assert_close(projector(run()), exact(x[:, 3:8].reshape(-1, 6)), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        projector(run(use_label_mask=False)), exact(x[:, :8].reshape(-1, 6)), rtol=0, atol=1e-6
    )


def test_batches_too_small_end_in_an_error_not_in_a_loop():
    case = load("toy_rho2")
    for method in ("gram", "ipca"):
        model, batches = toy(case)
        small = [{name: x[:3] for name, x in batches[0].items()}]
        with pytest.raises(InputError, match="fewer than the 8 components"):
            eva.initialize(model, small, method=method, max_batches=5, progress=False)


def test_what_still_moves_is_told():
    case = load("toy_rho2")
    model, batches = toy(case)
    with pytest.warns(UserWarning, match="still moved"):
        report = eva.initialize(model, batches, method="ipca", max_batches=3, progress=False)
    assert report.unconverged
    assert report.batches == 3


def test_constant_inputs_explain_nothing_and_lose_their_rank():
    case = load("toy_rho2")
    model, batches = toy(case)
    for batch in batches:
        batch["o_proj"] = torch.ones_like(batch["o_proj"])
    report = eva.initialize(model, batches, progress=False)
    assert report.explained["o_proj"] == 0
    assert report.ranks["o_proj"] < 4
    assert sum(report.ranks.values()) == 24


def test_the_same_token_everywhere_is_refused():
    model, batches = toy(load("toy_rho2"))
    same = [{name: torch.ones_like(x) for name, x in batch.items()} for batch in batches]
    with pytest.raises(InputError, match="no input varies"):
        eva.initialize(model, same, progress=False)


@pytest.mark.parametrize("center", [True, False])
def test_wide_inputs_by_lanczos_are_exact(center):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(1024, 1024, generator=generator) * torch.arange(1.0, 1025) ** -1.0
    x = torch.randn(1500, 1024, generator=generator) @ mix + 5
    wide = GramComponents(1024, 4, center=center)
    for part in (x[:700], x[700:701], x[701:]):
        wide.update(part)
    vectors, values, ratios = wide.solve()
    exact = x.double() - (x.double().mean(0) if center else 0)
    _, sizes, right = torch.linalg.svd(exact, full_matrices=False)
    torch.testing.assert_close(values, sizes[:4], rtol=1e-6, atol=0)
    torch.testing.assert_close(projector(vectors), projector(right[:4]), rtol=0, atol=1e-5)
    share = sizes.square()[:4] / sizes.square().sum()
    torch.testing.assert_close(ratios, share, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataloader": []}, "empty"),
        ({"adapter_name": "other"}, "no adapter 'other'"),
        ({"method": "svd"}, "gram"),
        ({"max_batches": 0}, "max_batches"),
        ({"model": nn.Linear(3, 3)}, "put a LoRA adapter"),
    ],
)
def test_bad_input(change, message):
    model, batches = toy(load("toy_rho1"))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        eva.initialize(**{"model": model, "dataloader": batches, "progress": False, **change})
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_nan_inputs_name_the_layer():
    model, batches = toy(load("toy_rho1"))
    batches[1]["up_proj"][0, 0] = float("nan")
    with pytest.raises(InputError, match="up_proj: a batch holds NaN"):
        eva.initialize(model, batches, progress=False)
    assert not model.base_model.model.up_proj._forward_hooks


class Chain(nn.Module):
    """Three layers of one width with different inputs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.a, self.b, self.c = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, ids, labels=None):
        return self.c(self.b(self.a(self.embed(ids)).relu()).relu())


def chain(**options):
    settings = peft.EvaConfig(rho=1.0)
    config = peft.LoraConfig(
        **{"r": 2, "target_modules": ["a", "b", "c"], "eva_config": settings, **options},
        init_lora_weights="eva",
    )
    return peft.get_peft_model(Chain(), config)


def texts(count=4):
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 50, (4, 12), generator=generator) for _ in range(count)]
    return [{"ids": x, "labels": torch.zeros_like(x)} for x in ids]


@pytest.mark.parametrize("method", ["gram", "ipca"])
def test_a_first_batch_without_labels_tells_nothing_of_who_shares_inputs(method):
    unlabelled = {"ids": texts()[0]["ids"], "labels": torch.full((4, 12), -100)}
    reports = [
        eva.initialize(chain(), batches, method=method, progress=False)
        for batches in (texts(), [unlabelled, *texts()])
    ]
    first, second = (report.explained for report in reports)
    assert first == pytest.approx(second)
    assert len(set(first.values())) == 3


def test_fewest_tokens():
    with pytest.raises(InputError, match="a saw 192 tokens, fewer than min_tokens=193"):
        eva.initialize(chain(), texts(), min_tokens=193, progress=False)
    eva.initialize(chain(), texts(), min_tokens=192, progress=False)


@pytest.mark.parametrize("rslora", [False, True])
def test_the_scaling_stays_when_ranks_move(rslora, tmp_path):
    settings = peft.EvaConfig(rho=2.0)
    model = chain(r=5, lora_alpha=10, use_rslora=rslora, eva_config=settings)
    ranks = eva.initialize(model, texts(), progress=False).ranks
    assert len(set(ranks.values())) > 1
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Chain(), tmp_path)
    for tuned in (model, loaded):
        for name, rank in ranks.items():
            if rank:
                layer = tuned.base_model.model.get_submodule(name)
                assert layer.scaling["default"] == pytest.approx(10 / 5**0.5 if rslora else 2.0)


class Ends(Chain):
    """A layer whose name is the end of another's."""

    def __init__(self):
        super().__init__()
        self.deep = nn.ModuleDict({"c": self.b})
        del self.b

    def forward(self, ids, labels=None):
        return self.c(self.deep["c"](self.a(self.embed(ids)).relu()).relu())


def test_ranks_are_those_of_whole_names(tmp_path):
    settings = peft.EvaConfig(rho=2.0)
    config = peft.LoraConfig(
        r=5, target_modules=["a", "c"], init_lora_weights="eva", eva_config=settings
    )
    model = peft.get_peft_model(Ends(), config)
    ranks = eva.initialize(model, texts(), progress=False).ranks
    assert ranks["c"] not in (5, ranks["deep.c"])
    assert eva.initialize(model, texts(), progress=False).ranks == ranks
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(Ends(), tmp_path)
    for name, rank in ranks.items():
        assert loaded.base_model.model.get_submodule(name).r["default"] == rank
