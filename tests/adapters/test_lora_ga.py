"""LoRA-GA against the official code and PEFT; saving, merging, what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fullrank.adapters import lora_ga
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
        ({"data": []}, "empty"),
        (
            {
                "data": [
                    {
                        "x": torch.full((2, 12), float("nan")).double(),
                        "labels": torch.ones(2, 10).double(),
                    }
                ]
            },
            "loss of batch 1 is nan",
        ),
        ({"data": [{"x": batches()[0]["x"]}]}, "no loss"),
        (
            {
                "data": [
                    {"x": torch.ones(6, 12).double(), "labels": torch.ones(6, 10).double()},
                ]
            },
            "fc: a gradient of rank 1 gives no start of rank 3",
        ),
        ({"direction": "AB"}, "ArB2r"),
        ({"scale": "large"}, "stable"),
        ({"n_batches": 0}, "n_batches"),
        ({"model": Shared().double()}, "out got no gradient"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(change, message):
    values = {
        "model": net(),
        "data": batches(),
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
