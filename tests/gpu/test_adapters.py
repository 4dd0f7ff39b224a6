"""Every adapter on a GPU: the CPU's start and training, and files that go from one to the other."""

import warnings

import pytest
import torch

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import cases  # noqa: E402
from cases import CASES, trained  # noqa: E402
from small_net import net, samples  # noqa: E402

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _no_warnings_of_peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def on(device, tensors):
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def put(case, device, monkeypatch):
    batches = cases.batches
    with monkeypatch.context() as patch:
        patch.setattr(cases, "batches", lambda: [on(device, b) for b in batches()])
        return case.put(net(dtype=torch.float64).to(device), 2)


def train(model, device, steps):
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.02)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**on(device, samples()))["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_case
def test_starts_where_the_cpu_starts_and_learns(case, monkeypatch):
    """The base's function at the start; both then come to a similar loss, whatever they draw."""
    x = samples()
    host, device = (put(case, name, monkeypatch) for name in ("cpu", "cuda"))
    assert {p.device.type for p in device.parameters()} == {"cuda"}
    first = host(**x)["loss"].item()
    assert device(**on("cuda", x))["loss"].item() == pytest.approx(first, rel=2e-2)
    losses = train(device, "cuda", 30)
    assert losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(train(host, "cpu", 30)[-1], rel=0.15)


@every_case
def test_a_file_of_the_gpu_serves_on_the_cpu(case, monkeypatch, tmp_path):
    model = put(case, "cuda", monkeypatch)
    train(model, "cuda", 3)
    x = samples()
    expected = model.eval()(**on("cuda", x))["logits"].cpu()
    model.save_pretrained(tmp_path)
    base = net(dtype=torch.float64)
    back = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    # PEFT keeps some adapters' factors in float32.
    torch.testing.assert_close(back(**x)["logits"], expected, rtol=1e-4, atol=1e-5)
