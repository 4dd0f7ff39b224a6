"""The streaming spectrum: that of the whole, whatever the batches; its sketch and its bound."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from two_processes import process_group

from fullrank.core.errors import InputError
from fullrank.core.sketched_moments import SketchedMoments
from fullrank.spectra import RankMeMeter, Spectrum, SpectrumMeter

MEASURES = (
    "effective_rank",
    "stable_rank",
    "nuclear_norm",
    "participation_ratio",
    "frobenius_norm",
)
FEW = pytest.mark.filterwarnings("ignore:.*their spectrum has at most")


def draw(n, k, rank, seed=0, decay=0.0):
    """Rows of a matrix of a given rank, whose singular values fall by a power."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(n, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, k, generator=generator, dtype=torch.float64)
    return left * torch.arange(1, rank + 1) ** -decay @ right


def streamed(Z, cuts=(), **options):
    meter = SpectrumMeter(**options)
    for batch in np.split(Z, sorted(cuts)):
        if len(batch):
            meter.update(batch)
    return meter.spectrum()


def whole(Z, center=False):
    return Spectrum(Z - Z.mean(0) if center else Z)


@FEW
@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 50),
    k=st.integers(1, 12),
    short=st.integers(0, 11),
    cuts=st.lists(st.integers(0, 50), max_size=4),
    center=st.booleans(),
    seed=st.integers(0, 999),
)
def test_streaming_equals_one_shot(n, k, short, cuts, center, seed):
    rank = max(min(n, k) - short, 1)
    Z = draw(n, k, rank, seed) + 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = streamed(Z, cuts, center=center)
    expected = whole(Z, center)
    # Adding 1 may raise the rank by one, centring takes one sample away.
    squares = expected.values**2
    full = squares[-1] > 1e-8 * squares[0]
    assert len(found) == min(n, k)
    for name in MEASURES:
        tolerance = 1e-8 if full else 1e-5
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=tolerance), name


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(12, 40),
    k=st.integers(1, 8),
    scale=st.floats(1e-30, 1e30),
    seed=st.integers(0, 99),
)
def test_ranks_keep_their_promises(n, k, scale, seed):
    Z = draw(n, k, k, seed)
    turn = torch.linalg.qr(draw(k, k, k, seed + 1)).Q
    spectrum = streamed(Z)
    assert 1 - 1e-9 <= spectrum.effective_rank <= k + 1e-9
    for changed in (Z * scale, Z @ turn, Z.flip(0)):
        assert streamed(changed).effective_rank == pytest.approx(spectrum.effective_rank, rel=1e-8)
    shares = (0.1, 0.5, 0.9, 0.99, 1.0)
    ranks = [spectrum.energy_rank(tau) for tau in shares]
    assert ranks == sorted(ranks)
    assert 1 <= ranks[0] <= ranks[-1] <= k


def test_rank_deficient_and_wide():
    # Rounding of a moment of this width must not pass for 284 small directions.
    Z = draw(3000, 384, 100, decay=1.0)
    found, expected = streamed(Z, [1000, 1500]), whole(Z)
    assert found.effective_rank == pytest.approx(expected.effective_rank, rel=1e-5)
    assert (found.values > 0).sum() == 100


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), kept=st.integers(1, 20), poison=st.sampled_from([1e9, np.nan]))
def test_padding_never_counts(seed, kept, poison):
    Z = draw(24, 4, 4, seed).reshape(4, 6, 4)
    mask = torch.zeros(24, dtype=torch.bool)
    mask[torch.randperm(24, generator=torch.Generator().manual_seed(seed))[:kept]] = True
    mask = mask.reshape(4, 6)
    poisoned = torch.where(mask[..., None], Z, poison)
    meter = SpectrumMeter()
    meter.update(poisoned, mask)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = meter.spectrum().values
    assert meter.count == kept
    assert values == pytest.approx(Spectrum(Z[mask]).values, rel=1e-6, abs=1e-6)


def test_memory_does_not_grow_and_state_goes_on():
    Z = draw(600, 6, 6)
    for options in ({}, {"exact_to": 3, "sketch": 5}):
        one, two, all_of_it = (SpectrumMeter(**options) for _ in range(3))
        for rows in Z.split(7):
            all_of_it.update(rows)
        sizes = {name: t.numel() for name, t in all_of_it.state_dict().items()}
        one.update(Z[:200])
        assert {name: t.numel() for name, t in one.state_dict().items()} == sizes
        resumed = SpectrumMeter(**options)
        resumed.load_state_dict(one.state_dict())
        resumed.update(Z[200:300])
        two.update(Z[300:])
        resumed.merge(two)
        resumed.merge(SpectrumMeter(**options))
        assert resumed.count == all_of_it.count == 600
        assert resumed.spectrum().values == pytest.approx(all_of_it.spectrum().values, rel=1e-9)
    with pytest.raises(InputError, match="other exact_to"):
        SpectrumMeter().load_state_dict(one.state_dict())
    resumed.reset()
    assert resumed.width is None
    assert resumed.state_dict() == {}


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
def test_the_sketch_keeps_its_bound(center, decay):
    Z = draw(400, 150, 150, decay=decay) + 0.1
    found = streamed(Z, [100], exact_to=100, sketch=60, center=center)
    true = whole(Z, center).values
    slack = 1e-9 * true[0] ** 2
    above = true[:60] ** 2 - found.values**2
    assert above.min() >= -slack
    assert above.max() <= found.missed + slack
    assert true[60] ** 2 <= found.missed + slack
    # What is known exactly: the sum of squares, with or without the values.
    assert found.frobenius_norm == pytest.approx(float(np.linalg.norm(true)), rel=1e-9)
    assert found.nuclear_norm <= true.sum() <= found.nuclear_norm + (150 * found.missed) ** 0.5
    # In expectation, for every r < l - 1; this seed stays within twice that.
    tails = [(1 + r / (59 - r)) * (true[r:] ** 2).sum() for r in range(58)]
    assert found.missed <= 2 * min(tails)


def test_a_sketch_that_holds_all_is_exact():
    Z = draw(300, 200, 20, decay=1.0)
    found = streamed(Z, exact_to=0, sketch=32)
    expected = whole(Z)
    assert found.missed <= 1e-9 * expected.frobenius_norm**2
    assert found.effective_rank == pytest.approx(expected.effective_rank, rel=1e-5)
    with pytest.warns(UserWarning, match="8 samples of width 200"):
        few = streamed(Z[:8], exact_to=0, sketch=32)
    assert len(few) == 8
    assert few.missed == 0
    assert few.values == pytest.approx(whole(Z[:8]).values, rel=1e-6)


def test_energies_of_a_spectrum_that_is_not_whole():
    spectrum = Spectrum([3.0, 1.0], missed=2.0)
    assert spectrum.frobenius_norm == pytest.approx(12**0.5)
    assert spectrum.stable_rank == pytest.approx(12 / 9)
    assert spectrum.energy[-1] == pytest.approx(10 / 12)
    assert spectrum.energy_rank(0.8) == 2
    assert spectrum != Spectrum([3.0, 1.0])
    with pytest.raises(InputError, match="a larger sketch"):
        spectrum.energy_rank(0.9)
    with pytest.raises(InputError, match="missed"):
        Spectrum([1.0], missed=-1.0)


def _worker(rank, folder, shards, options, results):
    with process_group(folder, rank, len(shards)):
        meter = SpectrumMeter(**options)
        if len(shards[rank]):
            meter.update(shards[rank])
        meter.sync()
        results[rank] = meter.spectrum().values
        empty = SpectrumMeter()
        empty.sync()
        assert empty.width is None


@pytest.mark.parametrize(
    ("cut", "options"),
    [(0, {"center": True}), (40, {"center": True}), (50, {"exact_to": 2, "sketch": 5})],
)
def test_sums_over_two_processes(tmp_path, cut, options):
    Z = draw(90, 6, 6) + (1e5 if "center" in options else 0)
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(
            _worker, (str(tmp_path), [Z[:cut], Z[cut:]], options, results), nprocs=2
        )
        values = [results[0], results[1]]
    expected = streamed(Z, **options).values
    for found in values:
        assert found == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_numbers_are_squared_in_wide_ones(dtype):
    # Squares of these underflow in half precision, and their sums lose most of it in bfloat16.
    Z = (1e-4 * draw(64, 5, 5)).to(dtype)
    assert streamed(Z).values == pytest.approx(Spectrum(Z).values, rel=1e-8)


@pytest.mark.parametrize("options", [{}, {"exact_to": 2, "sketch": 5}])
def test_a_large_mean_takes_no_digits_from_what_is_centred(options):
    Z = draw(90, 6, 6) + 1e6
    expected = streamed(Z - Z.mean(0), center=True, **options).values
    one, two, empty = (SpectrumMeter(center=True, **options) for _ in range(3))
    one.update(Z[:20])
    two.load_state_dict(one.state_dict())
    two.reset()
    two.update(torch.cat([Z[20:50], Z[:20] + 3.0]), torch.arange(50) < 30)
    one.merge(two)
    empty.merge(one)
    resumed = SpectrumMeter(center=True, **options)
    resumed.load_state_dict(empty.state_dict())
    resumed.update(Z[50:])
    assert resumed.count == 90
    assert resumed.spectrum().values == pytest.approx(expected, rel=1e-7)
    with pytest.raises(InputError, match="centres"):
        SpectrumMeter(**options).load_state_dict(one.state_dict())


def test_constant_features_are_no_direction():
    Z = draw(40, 3, 3)
    Z = torch.cat([Z, torch.full((40, 2), 7.0, dtype=torch.float64)], dim=1)
    centred = streamed(Z, [5], center=True)
    assert (centred.values > 0).sum() == 3
    same = streamed(torch.full((30, 4), 0.1), center=True)
    assert same.effective_rank == 0
    assert Spectrum(torch.zeros(3, 3)).effective_rank == 0


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (torch.ones(3, dtype=torch.int64), "floating-point"),
        (torch.ones(0, 4), "empty"),
        (torch.tensor([[1.0, float("nan")]]), "NaN"),
        (torch.tensor(1.0), "width"),
    ],
)
def test_bad_batches_change_nothing(batch, says):
    for options in ({}, {"exact_to": 1, "sketch": 1}):
        meter = SpectrumMeter(**options)
        with pytest.raises(InputError, match=says):
            meter.update(batch)
        assert meter.count == 0
        with pytest.raises(InputError, match="no samples"):
            meter.spectrum()
        meter.update(torch.eye(4))
        with pytest.raises(InputError, match="width"):
            meter.update(torch.ones(2, 3))
        with pytest.raises(InputError, match="mask"):
            meter.update(torch.ones(2, 4), torch.ones(3))
        assert meter.count == 4


@pytest.mark.parametrize("size", [1e-200, 1e200])
def test_what_cannot_be_squared_is_named(size):
    for options in ({}, {"exact_to": 1, "sketch": 2}, {"center": True}):
        meter = SpectrumMeter(**options)
        meter.update(size * draw(9, 3, 3))
        with pytest.raises(InputError, match="range of float64"):
            meter.spectrum()


def test_settings_are_checked():
    for options in ({"sketch": 0}, {"exact_to": -1}):
        with pytest.raises(InputError, match="exact_to"):
            SpectrumMeter(**options)
    with pytest.raises(InputError, match="sketch"):
        SketchedMoments(4, sketch=5)
    zero = SpectrumMeter(exact_to=0, sketch=2)
    zero.update(torch.zeros(6, 4))
    assert zero.spectrum().effective_rank == 0


@pytest.mark.parametrize(
    ("backends", "where"),
    [("cuda:nccl", "cuda:1"), ("cuda:gloo", "cuda:1"), ("cpu:gloo,cuda:nccl", "cpu")],
)
def test_sums_go_to_the_device_that_has_a_backend(monkeypatch, backends, where):
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda group: backends)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 1)
    meter = RankMeMeter()
    for _ in range(2):
        assert meter._where_summed(None) == torch.device(where)
        meter.update(torch.eye(3))
