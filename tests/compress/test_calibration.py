"""Streaming statistics: independent of batching, blind to padding, one side or the other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fullrank.compress import Batches, CalibrationStats
from fullrank.compress.targets import factorisable
from fullrank.core.errors import InputError, StoreError


class TokenModel(nn.Module):
    """Embeds ids, mixes each token alone, pools over the real ones."""

    def __init__(self, width=6, wide=10):
        super().__init__()
        self.embed = nn.Embedding(20, width)
        self.up = nn.Linear(width, wide)
        self.down = nn.Linear(wide, width)
        self.pool = nn.Linear(width, 3)

    def forward(self, input_ids, attention_mask):
        h = self.down(torch.tanh(self.up(self.embed(input_ids))))
        w = attention_mask[..., None].to(h)
        return self.pool((h * w).sum(1) / w.sum(1))


def batch(lengths, pad_to, seed=0):
    g = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, 20, (n,), generator=g) for n in lengths]
    ids = torch.stack([nn.functional.pad(r, (0, pad_to - len(r)), value=7) for r in rows])
    mask = torch.stack([(torch.arange(pad_to) < n).long() for n in lengths])
    return {"input_ids": ids, "attention_mask": mask}


def collect(model, batches, **kwargs):
    stats = CalibrationStats(factorisable(model), **kwargs)
    return stats.observe(model, batches, progress=False)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TokenModel().double()


def test_padding_never_counts(model):
    short, long = batch([3, 5, 2], 5), batch([3, 5, 2], 9)
    a = collect(model, [short], gradients=True)
    b = collect(model, [long], gradients=True)
    assert a["up"].count == b["up"].count == 10
    assert a["pool"].count == b["pool"].count == 3
    for name in a:
        torch.testing.assert_close(a[name].moments.covariance, b[name].moments.covariance)
        for part in ("gradient", "sequence_gradient", "sequence_mean"):
            first, second = (getattr(s[name].reaction, part) for s in (a, b))
            assert first.count == second.count
            torch.testing.assert_close(first.second, second.second)


@settings(max_examples=15, deadline=None)
@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=6), seed=st.integers(0, 999))
def test_statistics_do_not_depend_on_the_batches(sizes, seed):
    torch.manual_seed(seed)
    layer = nn.Linear(5, 4).double()
    x = torch.randn(sum(sizes), 5, dtype=torch.float64) * 3 + 10
    whole = collect(nn.Sequential(layer), [x])["0"]
    cut = collect(nn.Sequential(layer), list(x.split(sizes)))["0"]
    assert whole.count == cut.count
    torch.testing.assert_close(
        whole.moments.covariance, cut.moments.covariance, rtol=1e-10, atol=1e-10
    )


def test_sides_agree(model):
    data = [batch([4, 6, 3], 6, seed=s) for s in range(3)]
    sides = {s: collect(model, data, side=s) for s in ("input", "output", "auto")}
    assert sides["auto"]["up"].side == "input"
    assert sides["auto"]["down"].side == "output"
    for name, module in factorisable(model).items():
        W = module.weight.detach()
        reference = sides["input"][name]
        for other in sides.values():
            torch.testing.assert_close(
                other[name].output_covariance(W),
                reference.output_covariance(W),
                rtol=1e-9,
                atol=1e-12,
            )
            torch.testing.assert_close(
                other[name].output_mean(W), reference.output_mean(W), rtol=1e-9, atol=1e-12
            )


def test_gradients_are_those_of_the_whole_model_even_with_frozen_weights(model):
    data = [batch([4, 6, 3, 5] * 8, 6, seed=s) for s in range(40)]
    free = collect(model, data, gradients=True, side="output")
    for p in model.parameters():
        p.requires_grad_(False)
    frozen = collect(model, data, gradients=True, side="output")
    assert all(p.grad is None for p in model.parameters())
    J = model.pool.weight  # the pooled output's only reaction to `down` is through the mean
    for stats in (free, frozen):
        # Gradient summed over a sequence: J^T v, whose second moment is J^T J.
        found = stats["down"].reaction.sequence_gradient.second_moment
        torch.testing.assert_close(found, J.T @ J, rtol=0.25, atol=0.03)
    torch.testing.assert_close(
        free["up"].reaction.gradient.second, frozen["up"].reaction.gradient.second
    )


class Laid(TokenModel):
    """The same, on tokens laid out in another way."""

    def __init__(self, layout):
        super().__init__()
        self.layout = layout

    def forward(self, input_ids, attention_mask):
        h = self.embed(input_ids)
        there = h.flatten(0, 1) if self.layout == "flat" else h.transpose(0, 1)
        out = self.down(torch.tanh(self.up(there)))
        h = out.view_as(h) if self.layout == "flat" else out.transpose(0, 1)
        w = attention_mask[..., None].to(h)
        return self.pool((h * w).sum(1) / w.sum(1))


@pytest.mark.parametrize("layout", ["flat", "length first"])
def test_tokens_may_be_laid_out_in_any_way(model, layout):
    other = Laid(layout).double()
    other.load_state_dict(model.state_dict())
    # As many sequences as tokens: only the other batch tells which is which.
    data = [batch([3, 5, 2, 1, 4], 5), batch([4, 2], 6, seed=1)]
    a, b = (collect(m, data, gradients=True) for m in (model, other))
    for name in a:
        assert a[name].count == b[name].count
        torch.testing.assert_close(a[name].moments.second, b[name].moments.second)
        for part in ("sequence_mean", "sequence_gradient", "gradient"):
            first, second = (getattr(s[name].reaction, part) for s in (a, b))
            assert first.count == second.count
            torch.testing.assert_close(first.second, second.second)


@pytest.mark.parametrize("length", [4, 6])
def test_a_decoder_has_a_mask_of_its_own(length):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "num_layers": 1}
    config = transformers.T5Config(vocab_size=20, decoder_start_token_id=0, **sizes)
    net = transformers.T5ForConditionalGeneration(config).double()
    read, written = batch([6, 3, 2], 6), batch([2, 4, 1], length)
    data = {**read, **{f"decoder_{name}": value for name, value in written.items()}}
    layers = factorisable(net, include="*")
    stats = CalibrationStats(layers, gradients=True).observe(net, [data], progress=False)
    for name in stats:
        from_encoder = "encoder" in name or "EncDecAttention.k" in name
        from_encoder |= "EncDecAttention.v" in name
        assert stats[name].count == (11 if from_encoder else 7), name
        assert stats[name].reaction.gradient.count == stats[name].count
    # What is padding makes no difference.
    other = {name: value.clone() for name, value in data.items()}
    other["decoder_input_ids"][written["attention_mask"] == 0] = 1
    again = CalibrationStats(layers, gradients=True).observe(net, [other], progress=False)
    for name in stats:
        found, wanted = again[name].reaction.gradient, stats[name].reaction.gradient
        torch.testing.assert_close(found.second, wanted.second)


def test_sums_over_sequences_do_not_leave_the_range_of_float16():
    net = TokenModel(8, 24)
    net.embed.weight.data[:, 0] = 300.0
    net.up.weight.data[:, 0] = 0.0
    data = {"input_ids": torch.ones(2, 400, dtype=torch.long)}
    data["attention_mask"] = torch.ones_like(data["input_ids"])
    for dtype, mask in ((torch.float16, True), (torch.float16, False), (torch.bfloat16, True)):
        stats = CalibrationStats({"up": net.to(dtype).up}, gradients=True)
        with stats.watch(lambda mask=mask: data["attention_mask"] if mask else None):
            net.up(net.embed(data["input_ids"]))
        assert float(stats["up"].reaction.sequence_mean.mean[0]) == 300


@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_those_before_what_works_in_place(frozen):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(5, 8), nn.ReLU(inplace=i), nn.Linear(8, 3)) for i in (0, 1)]
    nets[1].load_state_dict(nets[0].state_dict())
    data = [torch.randn(50, 5)]
    a, b = (collect(net.requires_grad_(not frozen), data, gradients=True) for net in nets)
    torch.testing.assert_close(a["0"].reaction.gradient.second, b["0"].reaction.gradient.second)


def test_merge_save_and_load(model, tmp_path):
    data = [batch([4, 6, 3], 6, seed=s) for s in range(4)]
    # Without gradients nothing is drawn at random, and the parts add up to the whole.
    whole = collect(model, data)
    first, second = collect(model, data[:1]), collect(model, data[1:])
    first.merge(second)
    first.save(tmp_path / "stats.safetensors")
    loaded = CalibrationStats.load(tmp_path / "stats.safetensors")
    assert set(loaded) == set(whole)
    for name in whole:
        assert loaded[name].side == whole[name].side
        assert loaded[name].count == whole[name].count
        torch.testing.assert_close(loaded[name].moments.second, whole[name].moments.second)
    rich = collect(model, data, gradients=True)
    loaded = CalibrationStats.load(rich.save(tmp_path / "rich.safetensors"))
    assert torch.equal(
        loaded["up"].reaction.sequence_mean.second, rich["up"].reaction.sequence_mean.second
    )
    with pytest.raises(InputError, match="from a file"):
        loaded.observe(model, data, progress=False)
    with pytest.raises(InputError, match="cannot be merged"):
        whole.merge(CalibrationStats(factorisable(model), side="input"))


def test_a_file_that_is_something_else_is_named(tmp_path):
    with pytest.raises(StoreError, match="cannot be read"):
        CalibrationStats.load(tmp_path / "absent")
    (tmp_path / "cut").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}")
    with pytest.raises(StoreError):
        CalibrationStats.load(tmp_path / "cut")


def test_model_is_left_as_it_was(model):
    model.train()
    before = {n: p.clone() for n, p in model.named_parameters()}
    collect(model, [batch([3, 2], 4)], gradients=True)
    assert model.training
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    "form", [list, tuple, iter, np.array, lambda texts: dict(enumerate(texts)).values()]
)
def test_texts_come_in_any_iterable(model, form):
    def tokenizer(texts, **_):
        return batch([len(text) for text in texts], max(map(len, texts)))

    data = Batches(model, form(["aaa", "b", "cc"]), batch_size=2, tokenizer=tokenizer)
    for _ in range(2):
        # Wrapped once more, they keep their tokenizer.
        lengths = [b["attention_mask"].sum(1).tolist() for b in Batches(model, data)]
        assert lengths == [[1, 2], [3]]
        if form is iter:
            break
    assert [len(x) for x in Batches(model, iter([torch.ones(2, 3), torch.ones(4, 3)]))] == [2, 4]


def test_bad_data_is_named(model):
    with pytest.raises(InputError, match="empty"):
        Batches(model, [])
    with pytest.raises(InputError, match="empty"):
        collect(model, iter([]))
    with pytest.raises(InputError, match="without a tokenizer"):
        Batches(model, ["some text"])
    with pytest.raises(InputError, match="single Tensor"):
        Batches(model, torch.zeros(3))
    model.embed.weight.data[7] = float("nan")
    sevens = {**batch([4], 4), "input_ids": torch.full((1, 4), 7)}
    with pytest.raises(InputError, match=r"up: .*NaN"):
        collect(model, [sevens])


def test_patterns_that_match_nothing_are_named(model):
    with pytest.raises(InputError, match=r"no linear layer or convolution is named like 'fc\*'"):
        factorisable(model, include=["fc*"])
    with pytest.raises(InputError, match="embed"):
        factorisable(model, exclude=["embed"])
    assert list(factorisable(model, include=["up", "down"], exclude="up")) == ["down"]
