"""LoRA-GA against the official code and PEFT; saving, merging, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.adapters import lora_ga
from fullrank.adapters.gradient_sketch import sketches
from fullrank.adapters.gradients import fold_gradients
from fullrank.adapters.lora_ga_start import start_from_gradient
from fullrank.core.errors import InputError

peft = pytest.importorskip("peft")

REFERENCE = Path(__file__).parents[1] / "reference" / "lora-ga"
CASES = sorted(REFERENCE.glob("*.npz"))


def tensor(case, name):
    return torch.from_numpy(case[name])


@pytest.mark.parametrize("origin", ["official", "peft"])
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_factors_are_the_reference_ones(path, origin):
    case = np.load(path)
    scale = str(case["meta_scale"])
    start = start_from_gradient(
        tensor(case, "in_G"),
        int(case["meta_r"]),
        float(case[f"{origin}_scaling"]),
        tensor(case, "in_W0"),
        direction=str(case["meta_direction"]),
        scale=scale if origin == "official" else f"peft_{scale}",
        gamma=float(case["meta_gamma"]),
    )
    A, B = tensor(case, f"{origin}_A"), tensor(case, f"{origin}_B")
    for found, expected in ((start.A.T @ start.A, A.T @ A), (start.B @ start.B.T, B @ B.T)):
        # PEFT's own largest singular value of the weight is good to 0.2 %.
        tolerance = 5e-3 if (origin, scale) == ("peft", "weightS") else 2e-4
        size = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * size)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 20)
        self.out = nn.Linear(20, 10)

    def forward(self, x, labels=None):
        y = self.out(self.fc(x).tanh())
        return y if labels is None else nn.functional.mse_loss(y, labels)


def net():
    torch.manual_seed(0)
    return Net().double()


def batches(count=3):
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(6, 12, generator=generator, dtype=torch.float64),
            "labels": torch.randn(6, 10, generator=generator, dtype=torch.float64),
        }
        for _ in range(count)
    ]


def config(**changes):
    options = {"r": 3, "lora_alpha": 6, "target_modules": ["fc", "out"], "use_rslora": True}
    return peft.LoraConfig(**{**options, **changes})


def tuned(**changes):
    options = {"n_batches": 3, "grad_dtype": torch.float64, "progress": False}
    model = lora_ga.initialize(net(), batches(), config(), **{**options, **changes})
    return model.double()


def gradient(model, name):
    total = 0
    for batch in batches():
        model.zero_grad()
        model(**batch).backward()
        total = total + getattr(model, name).weight.grad
    return total / 3


def test_the_output_is_that_of_the_base_model():
    base, model = net(), tuned()
    x = batches()[0]["x"]
    torch.testing.assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)
    assert set(model.lora_ga.captured) == {"fc", "out"}
    G = gradient(base, "fc")
    S = torch.linalg.svdvals(G)
    assert model.lora_ga.captured["fc"] == pytest.approx(float(S[:6].norm() / S.norm()), rel=1e-5)


def test_the_first_step_is_the_best_low_rank_part_of_the_full_one():
    model = tuned(scale="unit")
    layer = model.base_model.model.fc
    A, B = (getattr(layer, n)["default"].weight for n in ("lora_A", "lora_B"))
    A0, B0 = A.detach().clone(), B.detach().clone()
    model.zero_grad()
    loss = sum(model(**batch) for batch in batches()) / 3
    loss.backward()
    eta, s = 1e-4, layer.scaling["default"]
    change = s * (-eta * B.grad @ A0 + B0 @ (-eta * A.grad))
    U, S, Vh = torch.linalg.svd(gradient(net(), "fc"))
    best = (U[:, :6] * S[:6]) @ Vh[:6]
    expected = -eta * s**2 * best
    torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_the_disabled_adapter_gives_the_base():
    model = train(tuned())
    x = batches()[0]["x"]
    before = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), net()(x), rtol=1e-6, atol=1e-6)
    assert torch.equal(model(x), before)


def test_subtracting_the_start_leaves_the_base_alone(tmp_path):
    base, x = net(), batches()[0]["x"]
    model = tuned(mode="subtract_init")
    torch.testing.assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)
    train(model)
    trained = model(x)
    other = train(tuned())(x)
    torch.testing.assert_close(trained, other, rtol=1e-5, atol=1e-6)
    for name in ("fc", "out"):
        layer = model.base_model.model.get_submodule(name)
        assert torch.equal(layer.get_base_layer().weight, base.get_submodule(name).weight)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    model.merge_adapter()
    torch.testing.assert_close(model(x), trained, rtol=1e-5, atol=1e-6)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), trained, rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "adapter").double()
    torch.testing.assert_close(again(x), trained, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.merge_and_unload()(x), trained, rtol=1e-5, atol=1e-6)


def test_half_precision_weights_stay_exact_when_the_start_is_subtracted():
    def start(mode):
        data = [{k: v.bfloat16() for k, v in batch.items()} for batch in batches()]
        options = {"n_batches": 3, "mode": mode, "progress": False}
        return lora_ga.initialize(net().bfloat16(), data, config(), **options)

    base = net().bfloat16()
    kept = start("subtract_init").base_model.model.fc.get_base_layer().weight
    assert torch.equal(kept, base.fc.weight)
    assert not torch.equal(start("residual").base_model.model.fc.get_base_layer().weight, kept)


@pytest.mark.parametrize("mode", ["residual", "subtract_init"])
def test_a_checkpoint_is_gone_on_from(mode, tmp_path):
    model = train(tuned(mode=mode))
    model.save_pretrained(tmp_path / "adapter")
    again = tuned(mode=mode)
    again.load_adapter(tmp_path / "adapter", "default", is_trainable=True)
    assert same(again.state_dict(), model.state_dict())
    other = tuned(mode=mode, direction="A2rBr")
    if mode == "residual":
        with pytest.raises(InputError, match="fc differs; start it with the same data and seed"):
            other.load_adapter(tmp_path / "adapter", "default")
    else:
        other.load_adapter(tmp_path / "adapter", "default")
        assert same(other.state_dict(), model.state_dict())
    smaller = lora_ga.initialize(net(), batches(), config(r=2), mode=mode, progress=False)
    with pytest.raises(InputError, match="other layers or ranks"):
        smaller.load_adapter(tmp_path / "adapter", "default")


def train(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for batch in batches():
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    return model


def test_a_saved_adapter_loads_on_a_fresh_base(tmp_path):
    model = train(tuned())
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "adapter").double()
    x = batches()[0]["x"]
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)
    assert again.peft_config["default"].r == 6
    base = net()
    with again.disable_adapter():
        assert torch.equal(again(x), base(x))
    merged = again.merge_and_unload()
    torch.testing.assert_close(merged(x), model(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(model.merge_and_unload()(x), merged(x), rtol=1e-5, atol=1e-6)


def test_rank_above_half_a_layer_is_lowered():
    with pytest.warns(UserWarning, match="lowered from 8 to 5"):
        model = lora_ga.initialize(
            net(), batches(), config(r=8, target_modules=["out"]), n_batches=2, progress=False
        )
    assert model.lora_ga.ranks == {"out": 5}
    x = batches()[0]["x"]
    torch.testing.assert_close(model(x), net()(x), rtol=1e-5, atol=1e-5)


def test_transposed_layers():
    from transformers.pytorch_utils import Conv1D

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.c = Conv1D(8, 12)

        def forward(self, x, labels=None):
            y = self.c(x)
            return y if labels is None else nn.functional.mse_loss(y, labels)

    data = [{"x": b["x"].float(), "labels": b["labels"][:, :8].float()} for b in batches()]
    options = config(target_modules=["c"], fan_in_fan_out=True)
    model = lora_ga.initialize(Model(), data, options, n_batches=3, progress=False)
    torch.testing.assert_close(model(data[0]["x"]), Model()(data[0]["x"]), rtol=1e-5, atol=1e-5)


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a) and a.keys() == b.keys()


class Shared(Net):
    """Only one of its two layers is reached."""

    def forward(self, x, labels=None):
        return self.fc(x).sum()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataloader": []}, "empty"),
        (
            {
                "dataloader": [
                    {
                        "x": torch.full((2, 12), float("nan")).double(),
                        "labels": torch.ones(2, 10).double(),
                    }
                ]
            },
            "loss of batch 1 is nan",
        ),
        ({"dataloader": [{"x": batches()[0]["x"]}]}, "no loss"),
        (
            {
                "dataloader": [
                    {"x": torch.ones(6, 12).double(), "labels": torch.ones(6, 10).double()},
                ]
            },
            "fc: a gradient of rank 1 gives no start of rank 3",
        ),
        ({"direction": "AB"}, "ArB2r"),
        ({"scale": "large"}, "stable"),
        ({"mode": "other"}, "subtract_init"),
        ({"estimate": "other"}, "sketch"),
        ({"estimate": "sketch", "model": Shared().double()}, "out got no gradient"),
        ({"n_batches": 0}, "n_batches"),
        ({"model": Shared().double()}, "out got no gradient"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(change, message):
    values = {
        "model": net(),
        "dataloader": batches(),
        "config": config(),
        "progress": False,
        **change,
    }
    before = {name: p.clone() for name, p in values["model"].state_dict().items()}
    with pytest.raises(InputError, match=message):
        lora_ga.initialize(**values)
    assert same(values["model"].state_dict(), before)
    assert isinstance(values["model"].fc, nn.Linear)
    assert all(p.requires_grad and p.grad is None for p in values["model"].parameters())


def low_rank(m, n, decay, seed=0):
    """A gradient whose singular values fall by a factor each."""
    generator = torch.Generator().manual_seed(seed)
    U, V = (
        torch.linalg.qr(torch.randn(k, min(m, n), generator=generator, dtype=torch.float64))[0]
        for k in (m, n)
    )
    return (U * decay ** torch.arange(min(m, n), dtype=torch.float64)) @ V.T


@pytest.mark.parametrize(("m", "n"), [(120, 90), (90, 120), (7, 40), (40, 7)])
def test_a_sketch_finds_the_leading_directions_of_the_mean(m, n):
    parts = [low_rank(m, n, 0.5, seed) for seed in range(2)]
    sketch = sketches({"w": (m, n)}, {"w": 6}, seed=3, dtype=torch.float64)["w"]
    for part in parts:
        sketch.add(part)
    U, S, Vh, norm = sketch.triplets(2)
    mean = sum(parts) / 2
    best = torch.linalg.svdvals(mean)
    kept = torch.linalg.matrix_norm(U.T @ mean @ Vh.T)
    assert kept > 0.99 * best[:6].norm()
    torch.testing.assert_close(S[:3], best[:3], rtol=0.05, atol=0)
    assert norm == pytest.approx(float(best.norm()), rel=0.5)
    assert torch.allclose(U.T @ U, torch.eye(6, dtype=torch.float64), atol=1e-10)


def test_a_sketch_is_much_smaller_than_what_it_is_of_and_shapes_share_their_draws():
    shapes = {"a": (1024, 1024), "b": (1024, 1024)}
    made = sketches(shapes, {"a": 16, "b": 16}, seed=0)
    assert made["a"].numbers < 0.2 * 1024**2
    assert made["a"]._omega is made["b"]._omega


def test_a_model_started_from_sketches_captures_what_the_exact_one_does():
    exact, sketched = tuned(estimate="exact"), tuned(estimate="sketch")
    x = batches()[0]["x"]
    torch.testing.assert_close(sketched(x), net()(x), rtol=1e-6, atol=1e-6)
    for name in ("fc", "out"):
        G = gradient(net(), name)
        kept = []
        for model in (exact, sketched):
            layer = model.base_model.model.get_submodule(name)
            A = torch.linalg.qr(layer.lora_A["default"].weight.detach().T)[0]
            B = torch.linalg.qr(layer.lora_B["default"].weight.detach())[0]
            kept.append(((G @ A).norm() ** 2 + (B.T @ G).norm() ** 2).sqrt())
        assert kept[1] > 0.95 * kept[0]


def test_there_is_one_gradient_at_a_time():
    model = net()
    weights = {"fc": model.fc.weight, "out": model.out.weight}
    held = []

    class Fold:
        def add(self, gradient):
            held.append(sum(p.grad is not None for p in model.parameters()))

    into = {name: Fold() for name in weights}
    assert fold_gradients(model, weights, into, batches(), 3, progress=False) == 3
    assert held == [1] * 6
    assert all(p.grad is None for p in model.parameters())
