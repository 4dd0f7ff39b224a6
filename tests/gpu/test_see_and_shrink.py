"""Spectra, gradient quality and factorisation on a GPU give what they give on a CPU."""

import copy

import pytest
import torch
from torch import nn

from fullrank.compress import CalibrationStats, LoRDConfig, factorize, lord_compress, make_plan
from fullrank.compress.rules import Energy
from fullrank.linalg import gram_spectrum, randomized_svd, truncated_svd
from fullrank.spectra import Spectrum, SpectrumMeter, rankme, xray
from fullrank.spectra.gradient_spectrum import gradient_spectrum


def draw(rows, columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return (left * torch.arange(1, columns + 1) ** -0.5).to(dtype)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24)).double()


def data(device, count=4):
    return [draw(100, 24, torch.float64).roll(i, 0).to(device) + i for i in range(count)]


@pytest.mark.parametrize("shape", [(300, 64), (64, 64), (20, 64)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_spectra(shape, dtype):
    A = draw(*shape, dtype)
    host, device = Spectrum(A), Spectrum(A.cuda())
    assert device.effective_rank == pytest.approx(host.effective_rank, rel=1e-5)
    torch.testing.assert_close(gram_spectrum(A.cuda()).cpu(), gram_spectrum(A))


@pytest.mark.parametrize("svd", [truncated_svd, randomized_svd])
def test_leading_singular_vectors(svd):
    A = draw(300, 64, torch.float64)
    found = svd(A.cuda(), 8)
    best = torch.linalg.svdvals(A)[:8]
    torch.testing.assert_close(found.S.cpu(), best, rtol=2e-2, atol=1e-6)
    assert found.U.is_cuda


def test_rankme_and_the_streamed_spectrum():
    Z = draw(500, 32)
    assert rankme(Z.cuda()) == pytest.approx(rankme(Z), rel=1e-6)
    meter = SpectrumMeter()
    for part in Z.cuda().split(100):
        meter.update(part)
    whole = SpectrumMeter()
    whole.update(Z)
    assert meter.spectrum().effective_rank == pytest.approx(whole.spectrum().effective_rank)


def test_xray():
    ours, theirs = xray(mlp().cuda(), show_progress=False), xray(mlp(), show_progress=False)
    assert ours.keys() == theirs.keys()
    for name, matrix in ours.items():
        assert matrix.spectrum.effective_rank == pytest.approx(
            theirs[name].spectrum.effective_rank, rel=1e-8
        )


def test_gradient_spectra():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).double()
    ids = torch.randint(0, 40, (12,))
    host = gradient_spectrum(model, ids, ids)
    device = gradient_spectrum(copy.deepcopy(model).cuda(), ids.cuda(), ids.cuda())
    assert host.keys() == device.keys()
    for name, spectrum in host.items():
        assert device[name].nuclear_norm == pytest.approx(spectrum.nuclear_norm, rel=1e-5)


def test_plans_and_factors():
    x = data("cpu")[0]
    host, device = mlp(), mlp().cuda()
    plan = make_plan(host, Energy(0.9))
    other = make_plan(device, Energy(0.9))
    assert {k: e.rank for k, e in plan.items()} == {k: e.rank for k, e in other.items()}
    a, b = factorize(host, plan), factorize(device, plan)
    torch.testing.assert_close(a(x), b(x.cuda()).cpu())
    assert {p.device.type for p in b.parameters()} == {"cuda"}


@pytest.mark.parametrize("sequential", [False, True])
def test_lord(sequential):
    x = data("cpu")[0]
    config = LoRDConfig(budget=0.6, sequential=sequential)
    a, table = lord_compress(mlp(), data("cpu"), config, progress=False)
    b, other = lord_compress(mlp().cuda(), data("cuda"), config, progress=False)
    assert [row[:2] for row in table.rows] == [row[:2] for row in other.rows]
    torch.testing.assert_close(a(x), b(x.cuda()).cpu(), rtol=1e-6, atol=1e-6)


def test_statistics_are_the_cpus():
    host, device = mlp(), mlp().cuda()
    found = []
    for model, place in ((host, "cpu"), (device, "cuda")):
        stats = CalibrationStats({"0": model[0], "2": model[2]})
        with stats.watch():
            for x in data(place):
                model(x)
        found.append(stats)
    a, b = found
    for name in ("0", "2"):
        assert a[name].count == b[name].count
        torch.testing.assert_close(a[name].moments.covariance, b[name].moments.covariance.cpu())
