"""The front door: every method by its name, plans, reports, and what is refused."""

import pytest
import torch
from torch import nn

from fullrank.adapters.adapt import adapt
from fullrank.adapters.adapt_methods import METHODS
from fullrank.adapters.export import save_as_lora
from fullrank.core.errors import InputError, PlanError
from fullrank.core.names import model_fingerprint
from fullrank.core.plan import PlanEntry, RankPlan

peft = pytest.importorskip("peft")

from fullrank.adapters.flylora_layer import FlyLoraLinear  # noqa: E402
from fullrank.adapters.hydra_layer import HydraLinear  # noqa: E402
from fullrank.adapters.lora_sb_layer import LoraSBLinear  # noqa: E402
from fullrank.adapters.randlora_layer import RandLoraLinear  # noqa: E402

LAYERS = {
    "flylora": FlyLoraLinear,
    "hydra": HydraLinear,
    "lora_sb": LoraSBLinear,
    "randlora": RandLoraLinear,
}
# All of two experts: another choice could not be merged.
NEEDED = {"lora_sb": {"lr": 1e-3, "n_samples": 12}, "flylora": {"k": 2}}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12)

    def forward(self, x):
        return x + self.o((self.q(x) * self.k(x)).tanh())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.q = nn.Linear(12, 10)

    def forward(self, x, labels=None):
        for block in self.blocks:
            x = block(x)
        y = self.q(x)
        return y if labels is None else nn.functional.mse_loss(y, labels)


def net():
    torch.manual_seed(0)
    return Net()


def data(count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(6, 5, 12, generator=generator),
            "labels": torch.randn(6, 5, 10, generator=generator),
        }
        for _ in range(count)
    ]


def put_on(method, model=None, **changes):
    needed = NEEDED.get(method, {})
    options = {"rank": 2, "data": data(), "progress": False, **needed, **changes}
    return adapt(model or net(), method, **options)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_starts_at_the_base_and_trains_and_survives_saving(method, tmp_path):
    batch = data()[0]
    model = put_on(method)
    assert isinstance(model, peft.PeftModel)
    if method == "lora_sb":  # the first update is in it
        assert model(**batch) < net()(**batch)
    else:
        torch.testing.assert_close(model(batch["x"]), net()(batch["x"]), rtol=1e-4, atol=1e-5)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        losses.append(model(**batch))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    trained = model(batch["x"])
    with model.disable_adapter():
        if method != "pissa":  # PEFT's changes the base and says so
            torch.testing.assert_close(model(batch["x"]), net()(batch["x"]), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "adapter")
    torch.testing.assert_close(again(batch["x"]), trained, rtol=1e-4, atol=1e-5)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(batch["x"]), trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_report_has_a_row_a_layer(method):
    model = put_on(method)
    report = model.adapt_report
    assert {layer.name for layer in report.layers} <= {
        canonical for canonical, m in net().named_modules() if isinstance(m, nn.Linear)
    }
    assert report.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert len(report.table().rows) == len(report.layers)
    needs = METHODS[method].needs
    for layer in report.layers:
        assert (layer.explained is not None) == (needs == "activations")
        assert (layer.captured is not None) == (needs == "gradients")
    assert ("GradNormLoRP" in report.optimizer) == (method == "gradnormlorp")


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_gives_each_layer_its_rank_at_the_same_scaling(method):
    ranks = {"q": 2, "blocks.0.q": 3, "blocks.1.o": 4}
    shapes = {name: tuple(net().get_submodule(name).weight.shape) for name in ranks}
    plan = RankPlan(
        {
            **{name: PlanEntry(shapes[name], rank) for name, rank in ranks.items()},
            "blocks.0.o": PlanEntry((12, 12), None),
        },
        purpose="adapter",
        fingerprint=model_fingerprint(net()),
    )
    if not METHODS[method].planned:
        with pytest.raises(PlanError, match="one rank"):
            put_on(method, rank=None, plan=plan)
        return
    model = put_on(method, rank=None, plan=plan)
    assert {layer.name: layer.rank for layer in model.adapt_report.layers} == ranks
    layers = [model.base_model.model.get_submodule(name) for name in ranks]
    assert len({round(layer.scaling["default"], 6) for layer in layers}) == 1


def test_eva_gives_a_plan_that_other_methods_take():
    first = put_on("eva", rho=2.0)
    plan = first.eva.plan
    assert sum(entry.rank or 0 for entry in plan.values()) == 2 * 7
    second = put_on("lora", rank=None, plan=plan)
    expected = {name: entry.rank for name, entry in plan.items() if entry.rank}
    assert {layer.name: layer.rank for layer in second.adapt_report.layers} == expected


def test_targets_are_ends_of_names_or_patterns():
    def names(targets):
        model = put_on("lora", targets=targets)
        return [layer.name for layer in model.adapt_report.layers]

    assert names("q") == ["blocks.0.q", "blocks.1.q", "q"]
    assert names(["blocks.*.k"]) == ["blocks.0.k", "blocks.1.k"]
    assert names(["blocks.0.o", "k"]) == ["blocks.0.k", "blocks.0.o", "blocks.1.k"]


NAN = [{"x": torch.full((2, 5, 12), float("nan")), "labels": torch.zeros(2, 5, 10)}]
SAME = [{"x": torch.zeros(2, 5, 12), "labels": torch.zeros(2, 5, 10)}]


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ("lora", {"rank": 11}, "q is 10 x 12: rank 11"),
        ("lora", {"rank": 0}, "rank 0 is not in"),
        ("lora", {"targets": ["nothing"]}, "no linear layer is named like 'nothing'"),
        ("lora", {"targets": []}, "targets is empty"),
        ("lora", {"no_such": 1}, "no 'no_such'"),
        ("eva", {"no_such": 1}, "eva has no option 'no_such'"),
        ("lorax", {}, "it is one of lora"),
        ("lora_sb", {"lr": None}, "needs lr"),
        ("lora_sb", {"data": data(1)}, "fewer than n_samples=12"),
        ("lora_sb", {"data": NAN, "n_samples": 2}, "loss of batch 1 is nan"),
        ("eva", {"data": None}, "needs activations"),
        ("lora_ga", {"data": None}, "needs gradients"),
        ("eva", {"data": []}, "empty"),
        ("lora_ga", {"data": []}, "empty"),
        ("eva", {"data": NAN}, "NaN"),
        ("lora_ga", {"data": NAN}, "loss of batch 1 is nan"),
        ("eva", {"data": SAME}, "no input varies"),
        ("lora_ga", {"data": SAME}, "gradient of"),
        ("eva", {"data": [{"x": torch.randn(1, 2, 12)}]}, "fewer than"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(method, changes, message):
    model = net()
    model.blocks[0].requires_grad_(False)
    asked = [p.requires_grad for p in model.parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        put_on(method, model, **changes)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert [p.requires_grad for p in model.parameters()] == asked
    assert not hasattr(model, "peft_config")
    assert model.training


def test_plans_of_other_models_and_adapted_models_are_refused():
    plan = RankPlan({"q": PlanEntry((10, 12), 2)}, purpose="adapter", fingerprint="0" * 16)
    with pytest.raises(PlanError, match="fingerprint"):
        put_on("lora", rank=None, plan=plan)
    with pytest.raises(InputError, match="not both"):
        put_on("lora", plan=plan)
    with pytest.raises(InputError, match="adapters already"):
        put_on("lora", put_on("lora"))


class Quantised(nn.Linear):
    """A layer whose weight is packed integers, as bitsandbytes' and others' are."""

    def __init__(self):
        super().__init__(12, 12)
        packed = torch.zeros(72, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


@pytest.mark.parametrize("method", ["lora_ga", "pissa"])
def test_quantised_layers_are_refused_where_weights_are_changed(method):
    model = net()
    model.blocks[1].k = Quantised()
    with pytest.raises(InputError, match=r"blocks\.1\.k is quantised .*without quantisation"):
        put_on(method, model)
    with pytest.raises(InputError, match=r"k is 12 x 12: rank 13"):
        put_on("lora", model, rank=13, targets="blocks.1.k")


def held(model):
    """Everything that a model consists of."""
    return {
        name: (
            type(module),
            module.training,
            sorted(module.__dict__),
            list(module._modules),
            {
                k: (id(p), p.data_ptr(), p.requires_grad, p.grad)
                for k, p in module._parameters.items()
            },
            {k: id(b) for k, b in module._buffers.items()},
            len(module._forward_hooks) + len(module._forward_pre_hooks),
        )
        for name, module in model.named_modules()
    }


@pytest.mark.parametrize("method", METHODS)
def test_a_failure_at_any_point_leaves_the_base_as_it_was(method, monkeypatch):
    """Ctrl-C in the middle: while layers are made, or in the second batch."""
    model = net()
    model.blocks[0].eval()
    model.blocks[1].o.requires_grad_(False)
    model.q.weight.grad = torch.ones_like(model.q.weight)
    before, values = held(model), {n: v.clone() for n, v in model.state_dict().items()}

    def interrupted():
        yield data()[0]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if METHODS[method].needs in ("nothing", "weights"):
            made = iter(range(100))
            layer_class = LAYERS.get(method, peft.tuners.lora.Linear)
            usual = layer_class.__init__

            def third(self, *args, **options):
                usual(self, *args, **options)
                if next(made) == 3:
                    raise KeyboardInterrupt

            patch.setattr(layer_class, "__init__", third)
        with pytest.raises(KeyboardInterrupt):
            put_on(method, model, data=interrupted())
    assert held(model) == before
    assert all(torch.equal(model.state_dict()[name], v) for name, v in values.items())
    put_on(method, model)


@pytest.mark.parametrize("method", ["lora", "eva", "lora_ga"])
def test_classifiers_are_trained_whole_and_given_back_after_errors(method, tmp_path):
    from tiny_models import bert_config
    from transformers import BertForSequenceClassification

    def base():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
        return BertForSequenceClassification(bert_config(30, num_labels=3, **sizes)).eval()

    generator = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(0, 30, (6, 12), generator=generator),
            "labels": torch.randint(0, 3, (6,), generator=generator),
        }
        for _ in range(3)
    ]
    options = {"rank": 1, "task_type": "SEQ_CLS", "progress": False}
    model = base()
    before = held(model)
    if method != "lora":
        with pytest.raises(InputError, match="empty"):
            adapt(model, method, data=[], **options)
        assert held(model) == before
    tuned = adapt(model, method, data=batches, **options)
    assert not any("classifier" in layer.name for layer in tuned.adapt_report.layers)
    trained = [n for n, p in tuned.named_parameters() if p.requires_grad]
    assert any("classifier.modules_to_save" in name for name in trained)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    expected = tuned.eval()(batches[0]["input_ids"]).logits
    for save in (tuned.save_pretrained, lambda folder: save_as_lora(tuned, folder)):
        save(tmp_path / "adapter")
        again = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
        found = again(batches[0]["input_ids"]).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_data_may_have_no_length():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from ({"x": batch["x"]} for batch in data())

    loader = torch.utils.data.DataLoader(Stream(), batch_size=None)
    assert put_on("eva", data=loader).eva.batches == len(list(loader))


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"r": 4}),
        ("lora", {"lora_alpha": 4}),
        ("rslora", {"use_rslora": False}),
        ("flylora", {"target_modules": ["q"]}),
        ("hydra", {"r_parallel": 1}),
        ("hydra", {"r": 1}),
        ("randlora", {"r": 4}),
    ],
)
def test_options_that_adapt_has_of_its_own_are_refused(method, options):
    name = next(iter(options))
    with pytest.raises(InputError, match=f"{name} follows from"):
        put_on(method, **options)
