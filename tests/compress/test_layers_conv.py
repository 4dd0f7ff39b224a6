"""Factorised convolutions: the same function as the dense one in every scheme and setting."""

import pytest
import torch
from torch import nn

from fullrank.compress.conv_split import split_conv
from fullrank.compress.layers_build import build_layer
from fullrank.compress.layers_conv import LowRankConv, LowRankConv1d, LowRankConv2d, LowRankConv3d
from fullrank.compress.matrices_conv import factor_numbers, matricise_conv
from fullrank.compress.stacked_svd import components
from fullrank.core.errors import InputError
from fullrank.core.plan import PlanEntry

SCHEMES = ("channel", "spatial", "decouple")
SETTINGS = {
    "plain": {"kernel_size": 3},
    "padding": {"kernel_size": 3, "padding": 1, "bias": False},
    "stride": {"kernel_size": 3, "stride": 2, "padding": (1, 2)},
    "strides": {"kernel_size": (3, 5), "stride": (2, 3), "padding": (0, 2), "dilation": (2, 1)},
    "one row": {"kernel_size": (1, 4), "padding": (0, 1)},
    "pointwise": {"kernel_size": 1},
    "same": {"kernel_size": (4, 3), "padding": "same", "dilation": (1, 2)},
    "valid": {"kernel_size": 3, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": (2, 1), "padding_mode": "reflect"},
    "circular": {"kernel_size": (3, 2), "padding": 1, "padding_mode": "circular", "stride": 2},
}


def conv(kind=nn.Conv2d, channels=(6, 8), dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return kind(*channels, dtype=dtype, **settings)


def full_rank(module, scheme):
    return min(matricise_conv(module, scheme).matrix.shape[-2:])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("channels", [(6, 8), (8, 3), (1, 5)])
def test_full_rank_is_the_dense_convolution(name, scheme, channels):
    dense = conv(channels=channels, **SETTINGS[name])
    layer = split_conv(dense, full_rank(dense, scheme), scheme)
    for shape in ((2, channels[0], 11, 12), (1, channels[0], 9, 9), (channels[0], 9, 10)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(layer(x), dense(x), rtol=0, atol=1e-10)
        torch.testing.assert_close(layer.to_dense()(x), dense(x), rtol=0, atol=1e-10)
    torch.testing.assert_close(layer.merged_weight(), dense.weight, rtol=0, atol=1e-12)
    assert layer.error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_truncated_is_the_truncated_weight_and_a_prefix(scheme):
    dense = conv(kernel_size=3, padding=1, stride=2)
    found = matricise_conv(dense, scheme)
    U, S, Vh = torch.linalg.svd(found.matrix, full_matrices=False)
    wanted = found.fold((U[..., :2] * S[..., None, :2]) @ Vh[..., :2, :])
    layer = split_conv(dense, 2, scheme)
    torch.testing.assert_close(layer.merged_weight(), wanted, rtol=1e-9, atol=1e-12)
    assert layer.error == pytest.approx(float(S[..., 2:].square().sum() / S.square().sum()))
    longer = split_conv(dense, 3, scheme)
    longer.truncate(2)
    torch.testing.assert_close(longer.merged_weight(), wanted, rtol=1e-9, atol=1e-12)
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(longer(x), layer(x))
    numbers = longer.first.numel() + longer.second.numel()
    assert numbers == factor_numbers(dense, scheme, 2)


@pytest.mark.parametrize("groups", [2, 3])
def test_groups_are_split_one_by_one(groups):
    dense = conv(channels=(6, 12), kernel_size=3, padding=1, groups=groups, stride=2)
    layer = split_conv(dense, full_rank(dense, "channel"))
    x = torch.randn(2, 6, 9, 9, dtype=torch.float64)
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(layer.to_dense()(x), dense(x))
    layer = split_conv(dense, 3)
    layer.truncate(1)
    torch.testing.assert_close(layer(x), split_conv(dense, 1)(x))
    with pytest.raises(InputError, match="in 2 groups is read by 'channel' only"):
        split_conv(conv(kernel_size=3, groups=2), 1, "spatial")


@pytest.mark.parametrize("scheme", ["channel", "decouple"])
def test_one_and_three_dimensions(scheme):
    for kind, wanted, shape in [
        (nn.Conv1d, LowRankConv1d, (2, 4, 9)),
        (nn.Conv3d, LowRankConv3d, (2, 4, 5, 6, 5)),
    ]:
        dense = conv(kind, (4, 5), kernel_size=3, padding=1, stride=2)
        layer = split_conv(dense, full_rank(dense, scheme), scheme)
        assert type(layer) is wanted
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(layer(x), dense(x))
        with pytest.raises(InputError, match="splits two dimensions"):
            split_conv(dense, 1, "spatial")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ["strides", "circular"])
def test_gradients_against_finite_differences(name, scheme):
    dense = conv(channels=(3, 4), **SETTINGS[name])
    layer = split_conv(dense, 2, scheme)
    parameters = dict(layer.named_parameters())
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        state = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(layer, state, (x,))

    values = [p.detach().clone().requires_grad_() for p in parameters.values()]
    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("balance", ["sqrt", "first", "second"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_balances_share_the_sizes_out(scheme, balance):
    dense = conv(kernel_size=3)
    layer = split_conv(dense, 3, scheme, balance)
    wanted = split_conv(dense, 3, scheme)
    torch.testing.assert_close(layer.merged_weight(), wanted.merged_weight())
    own = {"channel": 1, "spatial": 1, "decouple": 8}[scheme]
    first = layer.first.reshape(own, 3, -1).norm(dim=-1)
    second = layer.second.reshape(8, 3, -1)
    second = second.norm(dim=-1) if own > 1 else second.transpose(0, 1).flatten(1).norm(dim=1)
    sizes = components(matricise_conv(dense, scheme).matrix).sizes[..., :3].reshape(own, 3)
    shares = {"sqrt": (0.5, 0.5), "first": (1, 0), "second": (0, 1)}[balance]
    torch.testing.assert_close(first, sizes.pow(shares[0]))
    torch.testing.assert_close(second.reshape(own, 3), sizes.pow(shares[1]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_modes_of_the_dense_layer_are_kept(scheme):
    dense = conv(kernel_size=3, bias=False, dtype=torch.bfloat16).eval().requires_grad_(False)
    dense.weight.data = dense.weight.data.transpose(0, 1).contiguous().transpose(0, 1)
    layer = split_conv(dense, 2, scheme)
    assert layer.first.dtype == torch.bfloat16
    assert not layer.training
    assert not any(p.requires_grad for p in layer.parameters())
    assert layer.bias is None
    assert not layer.to_dense().weight.requires_grad
    assert layer(torch.randn(1, 6, 5, 5, dtype=torch.bfloat16)).shape == (1, 8, 3, 3)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_new_layer_has_the_variance_of_a_dense_one(scheme):
    torch.manual_seed(0)
    layer = LowRankConv2d(32, 48, 3, rank=9, scheme=scheme)
    dense = nn.Conv2d(32, 48, 3)
    got, wanted = layer.merged_weight().var().item(), dense.weight.var().item()
    assert got == pytest.approx(wanted, rel=0.15)


def test_a_zero_or_broken_weight():
    dense = conv(kernel_size=3)
    nn.init.zeros_(dense.weight)
    layer = split_conv(dense, 4)
    assert not layer.merged_weight().any()
    assert torch.isfinite(layer.second).all()
    dense.weight.data[0, 0, 0, 0] = float("inf")
    with pytest.raises(InputError, match="NaN or infinite"):
        split_conv(dense, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: split_conv(conv(kernel_size=3), 0), "rank 0"),
        (lambda: split_conv(conv(kernel_size=3), 9), r"rank 9 .* \[1, 8\]"),
        (lambda: split_conv(conv(kernel_size=3), 2, "rows"), "scheme 'rows'"),
        (lambda: split_conv(nn.Linear(3, 3), 2), "a Linear is no convolution"),
        (lambda: split_conv(nn.ConvTranspose2d(3, 3, 3), 2), "ConvTranspose2d is no"),
        (lambda: split_conv(conv(kernel_size=3), 2, balance="even"), "balance 'even'"),
        (lambda: LowRankConv2d(3, 4, 3, rank=2, scheme="rows"), "scheme 'rows'"),
        (lambda: split_conv(conv(kernel_size=3), 2).truncate(3), "cannot truncate rank 2 to 3"),
        (lambda: LowRankConv.like(nn.ReLU(), 1, "channel"), "a ReLU is no convolution"),
        (
            lambda: build_layer(conv(kernel_size=3), PlanEntry((8, 54), None, scheme="channel")),
            "leaves this layer dense",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message):
        call()
