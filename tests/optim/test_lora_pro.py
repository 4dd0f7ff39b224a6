"""LoRAPro: forms and modes against the equations, dtypes, skips, resume, bad input."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from fullrank.core.errors import InputError
from fullrank.optim import memory_table, state_bytes
from fullrank.optim.lora_adjust import CHOICES, adjust_lora_grads
from fullrank.optim.lora_pairs import LoraPair
from fullrank.optim.lora_pro import LoRAPro, create_lorapro_optimizer

FORMS = {
    "full": {},
    "efficient": {"mode": "efficient"},
    "sgd": {"optimizer": "sgd"},
    "bf16 moments": {"state_dtype": torch.bfloat16},
}


class LoraLinear(nn.Module):
    """What PEFT's layer looks like to the optimizer."""

    def __init__(self, m, n, r, s=2.0, dtype=torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(m, n, dtype=dtype) * 0.1, requires_grad=False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, r, bias=False, dtype=dtype)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(r, m, bias=False, dtype=dtype)})
        nn.init.zeros_(self.lora_B["default"].weight)
        self.scaling = {"default": s}

    def forward(self, x):
        lora = self.lora_B["default"](self.lora_A["default"](x))
        return x @ self.weight.T + self.scaling["default"] * lora


class Model(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.one = LoraLinear(12, 20, 3, dtype=dtype)
        self.two = LoraLinear(7, 12, 2, s=4.0, dtype=dtype)
        self.three = LoraLinear(12, 20, 3, dtype=dtype)
        self.norm = nn.LayerNorm(12, dtype=dtype)

    def forward(self, x):
        return self.two(self.norm(self.one(x) + self.three(x)))


def build(form="full", dtype=torch.float32, **options):
    torch.manual_seed(3)
    model = Model(dtype)
    return model, LoRAPro(model, lr=0.01, **{**FORMS[form], **options})


def train(model, optimizer, steps, nan_at=None):
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randn(16, 20, generator=generator).to(model.norm.weight.dtype)
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        if t == nan_at:
            model.one.lora_B["default"].weight.grad[0, 0] = float("nan")
        optimizer.step()


def pair(m=6, n=9, r=2, dtype=torch.float64):
    A = nn.Parameter(torch.randn(r, n, dtype=dtype))
    B = nn.Parameter(torch.randn(m, r, dtype=dtype) * 0.1)
    return A, B


# -- the equations ---------------------------------------------------------------------------


@pytest.mark.parametrize("x", CHOICES)
@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1)])
@pytest.mark.parametrize("form", ["full", "efficient", "sgd"])
def test_equals_the_equations(form, shape, x):
    m, n = shape
    r, s, lr, wd, eps = min(2, m, n), 1.5, 0.02, 0.1, 1e-8
    A, B = pair(m, n, r)
    a, b = A.detach().clone(), B.detach().clone()
    optimizer = LoRAPro([(A, B, s)], lr=lr, x=x, weight_decay=wd, **FORMS[form])
    state = {}

    def adam(key, g, t):
        mean, square = state.get(key, (torch.zeros_like(g), torch.zeros_like(g)))
        state[key] = (0.9 * mean + 0.1 * g, 0.999 * square + 0.001 * g * g)
        mean, square = state[key]
        return mean / (1 - 0.9**t) / ((square / (1 - 0.999**t)).sqrt() + eps)

    for t in range(1, 6):
        G = torch.randn(m, n, dtype=torch.float64)
        A.grad, B.grad = s * b.T @ G, s * G @ a.T
        optimizer.step()
        g_a, g_b = s * b.T @ G, s * G @ a.T
        decay = 1 - lr * wd
        if form == "full":
            dA, dB = adjust_lora_grads(a, b, g_a, g_b, s, "zero")
            N = adam("W", s * b @ dA + s * dB @ a, t)
            dA, dB = adjust_lora_grads(a, b, s * b.T @ N, s * N @ a.T, s, x)
            decay = math.sqrt(decay)
        else:
            dA, dB = adjust_lora_grads(a, b, g_a, g_b, s, x)
            if form == "efficient":
                dA, dB = adam("A", dA, t), adam("B", dB, t)
        a, b = decay * a - lr * dA, decay * b - lr * dB
    torch.testing.assert_close(A.detach(), a, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(B.detach(), b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("form", ["efficient", "sgd"])
def test_decaying_the_base_decays_the_whole_weight(form):
    A, B = pair()
    base = torch.randn(6, 9, dtype=torch.float64)
    whole = base + 2.0 * B.detach() @ A.detach()
    optimizer = LoRAPro(
        [(A, B, 2.0, base)], lr=0.1, weight_decay=0.5, decay_base=True, **FORMS[form]
    )
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)
    optimizer.step()
    torch.testing.assert_close(base + 2.0 * B.detach() @ A.detach(), 0.95 * whole)


def test_a_base_under_two_adapters_decays_once():
    base = torch.ones(6, 9, dtype=torch.float64)
    pairs = [(*pair(), 1.0, base), (*pair(), 2.0, base)]
    optimizer = LoRAPro(pairs, lr=0.1, weight_decay=0.5, decay_base=True)
    for A, B, *_ in pairs:
        A.grad, B.grad = torch.ones_like(A), torch.ones_like(B)
    optimizer.step()
    torch.testing.assert_close(base, torch.full_like(base, 0.95))


@pytest.mark.parametrize("form", ["full", "efficient", "sgd"])
def test_what_is_no_pair_gets_the_plain_optimizer(form):
    model, optimizer = build(form, weight_decay=0.1)
    twin = copy.deepcopy(model.norm)
    kind = torch.optim.SGD if form == "sgd" else torch.optim.AdamW
    plain = kind(twin.parameters(), lr=0.01, weight_decay=0.1 if form != "sgd" else 0.0)
    for t in range(3):
        for ours, theirs in zip(model.norm.parameters(), twin.parameters(), strict=True):
            ours.grad = torch.full_like(ours, t + 1.0)
            theirs.grad = ours.grad.clone()
            if form == "sgd":
                theirs.data.mul_(1 - 0.01 * 0.1)
        optimizer.step()
        plain.step()
    for ours, theirs in zip(model.norm.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_small_step_lowers_the_loss():
    model, _ = build()
    optimizer = LoRAPro(model, lr=1e-3, optimizer="sgd")
    x = torch.randn(64, 20)
    train(model, LoRAPro(model, lr=0.01), range(2))
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        assert model(x).square().mean() < loss


def test_pairs_of_a_shape_together_equal_pairs_alone():
    model, optimizer = build("efficient", torch.float64)
    twin = copy.deepcopy(model)
    alone = [
        LoRAPro([(m.lora_A["default"].weight, m.lora_B["default"].weight, m.scaling["default"])],
                lr=0.01, mode="efficient")
        for m in (twin.one, twin.two, twin.three)
    ]  # fmt: skip
    for t in range(3):
        x = torch.randn(8, 20, generator=torch.Generator().manual_seed(t)).double()
        for net in (model, twin):
            net.zero_grad()
            net(x).square().mean().backward()
        model.norm.zero_grad()
        twin.norm.zero_grad()
        optimizer.step()
        for each in alone:
            each.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_convolutions_are_read_as_matrices():
    A = nn.Parameter(torch.randn(2, 3, 3, 3, dtype=torch.float64))
    B = nn.Parameter(torch.randn(5, 2, 1, 1, dtype=torch.float64))
    flat = [nn.Parameter(t.detach().flatten(1).clone()) for t in (A, B)]
    for mode in ("full", "efficient"):
        conv = LoRAPro([(A, B, 2.0)], lr=0.1, mode=mode)
        matrix = LoRAPro([(*flat, 2.0)], lr=0.1, mode=mode)
        for _ in range(3):
            for p, q in zip((A, B), flat, strict=True):
                p.grad = torch.randn_like(p)
                q.grad = p.grad.flatten(1).clone()
            conv.step()
            matrix.step()
    for p, q in zip((A, B), flat, strict=True):
        assert torch.equal(p.flatten(1), q)


@pytest.mark.parametrize("form", ["full", "efficient", "sgd"])
def test_layout_of_factors_and_gradients_does_not_matter(form):
    A, B = pair()
    turned = [nn.Parameter(t.detach().T.contiguous().T) for t in (A, B)]
    optimizers = [LoRAPro([(*each, 2.0)], lr=0.1, **FORMS[form]) for each in ((A, B), turned)]
    for _ in range(3):
        for p, q in zip((A, B), turned, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.T.contiguous().T
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip((A, B), turned, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


# -- dtypes and state ------------------------------------------------------------------------


def test_half_precision_warns_and_follows_float32():
    with pytest.warns(UserWarning, match="keep the factors in float32"):
        half, optimizer = build("efficient", torch.bfloat16)
    full, other = build("efficient")
    full.load_state_dict(half.state_dict())
    train(half, optimizer, range(4))
    train(full, other, range(4))
    A = half.one.lora_A["default"].weight
    assert A.dtype == torch.bfloat16
    assert optimizer.state[A]["exp_avg"].dtype == torch.float32
    assert (A - full.one.lora_A["default"].weight).norm() < 0.1 * A.norm()


def test_bf16_moments_stay_close():
    narrow, optimizer = build("bf16 moments")
    wide, other = build("full")
    train(narrow, optimizer, range(5))
    train(wide, other, range(5))
    A = narrow.one.lora_A["default"].weight
    assert optimizer.state[A]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.state[A]["exp_avg"].any()
    for a, b in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert (a - b).norm() < 0.05 * b.norm() + 1e-3


def test_state_bytes_follow_the_formula():
    scalars = 8
    for form, per_pair in (
        ("full", lambda m, n, r: 2 * m * n * 4),
        ("bf16 moments", lambda m, n, r: 2 * m * n * 2),
        ("efficient", lambda m, n, r: 2 * r * (m + n) * 4),
        ("sgd", lambda m, n, r: 0),
    ):
        model, optimizer = build(form)
        others = list(model.norm.parameters())
        moments = {"sgd": 0, "bf16 moments": 4}.get(form, 8)
        expected = sum(moments * p.numel() + scalars for p in others)
        expected += sum(per_pair(*p.shape) + 2 * scalars for p in optimizer.pairs)
        table = memory_table(optimizer)
        assert dict(zip(table.columns, table.rows[-1], strict=True))["optimizer state"] == expected
        train(model, optimizer, range(1))
        assert state_bytes(optimizer) == expected


def test_large_moments_are_announced():
    with torch.device("meta"):
        A, B = nn.Parameter(torch.zeros(2, 20_000)), nn.Parameter(torch.zeros(20_000, 2))
    with pytest.warns(UserWarning, match=r"will take 2\.98 GiB"):
        LoRAPro([(A, B, 1.0)])


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_continuing_is_bit_equal_at_every_step(form, dtype):
    whole, optimizer = build(form, dtype, weight_decay=0.01)
    train(whole, optimizer, range(6), nan_at=3)
    for stop in range(6):
        first, one = build(form, dtype, weight_decay=0.01)
        train(first, one, range(stop), nan_at=3)
        second, two = build(form, dtype, weight_decay=0.01)
        second.load_state_dict(through_a_file(first.state_dict()))
        two.load_state_dict(through_a_file(one.state_dict()))
        train(second, two, range(stop, 6), nan_at=3)
        for a, b in zip(whole.parameters(), second.parameters(), strict=True):
            assert torch.equal(a, b), stop
            for name, value in optimizer.state.get(a, {}).items():
                assert value.dtype == two.state[b][name].dtype
                assert torch.equal(value, two.state[b][name])


def test_copies_of_model_and_optimizer_work():
    model, optimizer = build()
    train(model, optimizer, range(2))
    twin, other = copy.deepcopy((model, optimizer))
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_of_others_are_refused():
    model, optimizer = build()
    train(model, optimizer, range(2))
    groups = [{"params": group["params"]} for group in optimizer.param_groups]
    foreign = torch.optim.AdamW(groups, lr=0.1)
    foreign.step()
    with pytest.raises(InputError, match="another optimizer"):
        optimizer.load_state_dict(foreign.state_dict())
    wider = Model()
    wider.two = LoraLinear(7, 12, 5)
    with pytest.raises(InputError, match="shape"):
        LoRAPro(wider, mode="efficient").load_state_dict(build_and_train_efficient())
    train(model, optimizer, range(2, 3))


def build_and_train_efficient():
    model, optimizer = build("efficient")
    train(model, optimizer, range(1))
    return optimizer.state_dict()


def test_the_saved_mode_wins_as_for_every_group_key():
    model, optimizer = build("efficient")
    train(model, optimizer, range(2))
    twin, other = build("full")
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["mode"] == "efficient"
    train(twin, other, range(1))


# -- gradients that are not finite -----------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_a_nan_leaves_everything_as_it_was(form, on_device_or_not):
    model, optimizer = build(form, weight_decay=0.1)
    train(model, optimizer, range(2))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    train(model, optimizer, [2], nan_at=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[0][name])
    for i, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            if name not in ("step", "unseen"):
                assert torch.equal(value, before[1][i][name])
        assert (state["step"], state["unseen"]) == (3, 1)
    train(model, optimizer, range(3, 5))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.fixture(params=[False, True], ids=["host", "device"])
def on_device_or_not(request):
    if request.param:
        request.getfixturevalue("on_device")


@pytest.mark.parametrize("form", ["full", "efficient", "sgd"])
def test_the_device_path_takes_the_same_steps(form, monkeypatch):
    from fullrank.optim import foundation, gradients

    host, optimizer = build(form, torch.float64, weight_decay=0.1)
    train(host, optimizer, range(5), nan_at=2)
    for module in (foundation, gradients):
        monkeypatch.setattr(module, "host_decides", lambda device: False)
    device, other = build(form, torch.float64, weight_decay=0.1)
    train(device, other, range(5), nan_at=2)
    for a, b in zip(host.parameters(), device.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-14 if form == "sgd" else 1e-7)


def test_a_nan_raises_on_request_and_names_the_parameter():
    model, optimizer = build(nonfinite="raise")
    train(model, optimizer, range(1))
    with pytest.raises(InputError, match=r"one\.lora_B"):
        train(model, optimizer, [1], nan_at=1)


# -- bad input -------------------------------------------------------------------------------


def test_half_a_pair_is_refused_before_anything_changes():
    model, optimizer = build()
    train(model, optimizer, range(1))
    before = copy.deepcopy(model.state_dict())
    optimizer.zero_grad()
    model.one.lora_A["default"].weight.grad = torch.ones(3, 20)
    with pytest.raises(InputError, match=r"B of one \(default\) has no gradient"):
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert optimizer.state[model.one.lora_A["default"].weight]["step"] == 1


def test_a_pair_without_gradients_rests():
    model, optimizer = build()
    train(model, optimizer, range(1))
    before = model.two.lora_A["default"].weight.detach().clone()
    optimizer.zero_grad()
    for half in (model.one.lora_A, model.one.lora_B):
        half["default"].weight.grad = torch.ones_like(half["default"].weight)
    optimizer.step()
    assert torch.equal(model.two.lora_A["default"].weight, before)


def test_frozen_halves_are_refused():
    model = Model()
    model.two.lora_A["default"].weight.requires_grad_(False)
    with pytest.raises(InputError, match="only one half"):
        LoRAPro(model)


def test_frozen_pairs_are_left_alone():
    model = Model()
    model.two.requires_grad_(False)
    assert [p.name for p in LoRAPro(model).pairs] == ["one (default)", "three (default)"]


def test_factors_that_are_replaced_by_flat_shards_are_refused():
    _, optimizer = build()
    flat = nn.Parameter(torch.zeros(100))
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones(100)
    with pytest.raises(InputError, match="ZeRO"):
        optimizer.step()


def test_embeddings_and_experts_are_announced_and_stepped_plainly():
    model = Model()
    model.words = nn.Module()
    model.words.lora_embedding_A = nn.ParameterDict({"default": torch.randn(2, 30)})
    model.words.lora_embedding_B = nn.ParameterDict({"default": torch.zeros(8, 2)})
    model.two.num_experts = 2
    with pytest.warns(UserWarning, match=r"two \(default\) and 1 more are no plain pair"):
        optimizer = LoRAPro(model)
    assert len(optimizer.pairs) == 2
    assert sum(p is model.words.lora_embedding_A["default"] for p in
               optimizer.param_groups[1]["params"]) == 1  # fmt: skip


A, B = torch.zeros(2, 5), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("pairs", "options", "says"),
    [
        ([], {}, "no trainable LoRA pair"),
        (nn.Linear(3, 3), {}, "no trainable LoRA pair"),
        ([A, B], {}, "item 0 is Tensor"),
        ([(A, B)], {}, "expected"),
        ([(A, "B", 1.0)], {}, "must be tensors"),
        ([(A, B, 0.0)], {}, "scaling=0"),
        ([(A, B, float("inf"))], {}, "scaling=inf"),
        ([(B, A, 1.0)], {}, "expected"),
        ([(A, torch.zeros(8), 1.0)], {}, "flattened or sharded"),
        ([(torch.zeros(0, 5), torch.zeros(4, 0), 1.0)], {}, "flattened or sharded"),
        ([(A, B.double(), 1.0)], {}, "agree"),
        ([(A, B, 1.0), (A, torch.zeros(7, 2), 1.0)], {}, "two pairs"),
        ([(A, B, 1.0)], {"optimizer": "adam"}, "optimizer="),
        ([(A, B, 1.0)], {"mode": "half"}, "mode="),
        ([(A, B, 1.0)], {"x": None}, "x=None"),
        ([(A, B, 1.0)], {"lr": -1.0}, "lr"),
        ([(A, B, 1.0)], {"betas": (0.9, 1.0)}, "betas"),
        ([(A, B, 1.0)], {"weight_decay": -0.1}, "weight_decay"),
        ([(A, B, 1.0)], {"delta": -1e-8}, "delta"),
        ([(A, B, 1.0)], {"state_dtype": torch.int8}, "state_dtype"),
        ([(A, B, 1.0)], {"decay_base": True}, "no base weight"),
        ([(A, B, 1.0, torch.zeros(4, 5, dtype=torch.uint8))], {"decay_base": True}, "uint8"),
        ([(A, B, 1.0)], {"nonfinite": "hope"}, "nonfinite"),
    ],
)
def test_bad_input(pairs, options, says):
    with pytest.raises(InputError, match=says):
        LoRAPro(pairs, **options)


def test_sparse_and_complex_are_refused():
    A, B = pair()
    optimizer = LoRAPro([(A, B, 1.0)])
    A.grad, B.grad = torch.ones_like(A).to_sparse(), torch.ones_like(B)
    with pytest.raises(InputError, match="sparse"):
        optimizer.step()
    wild = [nn.Parameter(torch.zeros(shape, dtype=torch.complex64)) for shape in ((2, 5), (4, 2))]
    with pytest.raises(InputError, match="complex"):
        LoRAPro([(*wild, 1.0)])


def test_momentum_is_no_argument():
    with pytest.raises(TypeError, match="momentum"):
        LoRAPro([(*pair(), 1.0)], optimizer="sgd", momentum=0.9)


def test_pairs_as_dicts_and_objects():
    first, second = pair(), pair()
    optimizer = LoRAPro(
        [
            {"A": first[0], "B": first[1], "scaling": 2.0},
            LoraPair(*second, 3.0, name="mine"),
        ]
    )
    assert [p.scaling for p in optimizer.pairs] == [2.0, 3.0]
    assert optimizer.pairs[1].name == "mine"


def test_the_factory_names_parameters():
    optimizer = create_lorapro_optimizer(Model(), lr=0.5)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["param_names"][0] == "one.lora_A.default.weight"
    assert optimizer.param_groups[1]["param_names"] == ["norm.weight", "norm.bias"]


def test_gradient_descent_is_between_lora_and_the_whole_weight():
    """Least squares to a target of decaying spectrum, each at the best of a few rates."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    U, V = torch.linalg.qr(draw(32, 32))[0], torch.linalg.qr(draw(48, 48))[0]
    gap = (U * 0.7 ** torch.arange(32.0)) @ V[:, :32].T
    Q = torch.linalg.qr(draw(48, 48))[0]
    covariance = (Q * torch.logspace(0, -1.5, 48).double()) @ Q.T
    start = draw(4, 48) / 48**0.5

    def loss(delta):
        return float(((delta - gap) @ covariance * (delta - gap)).sum() / 2)

    def run(method, lr):
        whole = nn.Parameter(torch.zeros_like(gap))
        A, B = nn.Parameter(start.clone()), nn.Parameter(start.new_zeros(32, 4))
        optimizer = {
            "whole": lambda: torch.optim.SGD([whole], lr=lr),
            "lora": lambda: torch.optim.SGD([A, B], lr=lr),
            "pro": lambda: LoRAPro([(A, B, 2.0)], lr=lr, optimizer="sgd"),
        }[method]()
        for _ in range(100):
            delta = (whole if method == "whole" else 2.0 * B @ A).detach()
            G = (delta - gap) @ covariance
            if G.norm() > 1e6:
                return float("inf")
            whole.grad, A.grad, B.grad = G, 2.0 * B.detach().T @ G, 2.0 * G @ A.detach().T
            optimizer.step()
        return loss((whole if method == "whole" else 2.0 * B @ A).detach())

    rates = [0.1, 0.5, 1.0, 1.7]
    found = {method: [run(method, lr) for lr in rates] for method in ("whole", "pro", "lora")}
    assert min(found["whole"]) < min(found["pro"]) < min(found["lora"])
    # Stable at the step size of the whole weight, where LoRA is not.
    assert found["pro"][-1] == min(found["pro"])
    assert found["lora"][-1] == float("inf")
