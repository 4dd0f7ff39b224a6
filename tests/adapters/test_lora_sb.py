"""LoRA-SB: the official numbers, what its start and its steps are, and what is refused."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from fullrank.adapters import lora_sb  # noqa: E402
from fullrank.adapters.adapt import adapt  # noqa: E402
from fullrank.adapters.export import save_as_lora  # noqa: E402
from fullrank.adapters.lora_sb import LoraSBConfig  # noqa: E402
from fullrank.adapters.lora_sb_start import (  # noqa: E402
    Start,
    first_update,
    start_from_update,
    start_from_weight,
)
from fullrank.core.errors import InputError  # noqa: E402

FOLDER = Path(__file__).parents[1] / "reference" / "lora-sb"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))
NEAR = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=NAMES)
def official(request):
    with np.load(FOLDER / f"{request.param}.npz") as arrays:
        return {name: torch.tensor(array) for name, array in arrays.items()}


def base_of(v):
    m, n = v["in_W0"].shape
    layer = nn.Linear(n, m)
    layer.load_state_dict({"weight": v["in_W0"], "bias": v["in_bias"]})
    return nn.Sequential(layer)


def put_on(base, r, init="update", **options):
    config = LoraSBConfig(r=r, target_modules=["0"], init=init, **options)
    return peft.get_peft_model(base, config)


def mean_loss(model, batch):
    x, target = batch
    return (model(x) - target).square().mean()


def theirs(model, batch):
    """The official weights: a batch's mean loss over its size, so that a short one counts more."""
    return mean_loss(model, batch) / len(batch[0]) ** 2


def layer_of(model):
    return model.base_model.model[0]


def test_the_first_update_and_its_truncation(official):
    v, r, lr = official, int(official["meta_r"]), float(official["meta_lr"])
    model = put_on(base_of(v), r)
    data = list(zip(v["in_X"].split(3), v["in_T"].split(3), strict=True))
    count = int(v["meta_num_samples"])
    report = lora_sb.initialize(model, data, lr, count, loss_fn=theirs, progress=False)
    layer = layer_of(model)
    A, B, R = (getattr(layer, f"lorasb_{name}")["default"].detach() for name in "ABR")
    eye = torch.eye(r)
    torch.testing.assert_close(A @ A.T, eye, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(B.T @ B, eye, rtol=1e-6, atol=1e-6)
    U, S, Vt = v["derived_U"], v["derived_S"], v["derived_Vt"]
    best = (U[:, :r] * S[:r] @ Vt[:r]).float()
    torch.testing.assert_close(B @ R @ A, best, **NEAR)
    torch.testing.assert_close(R, torch.diag(S[:r]).float(), **NEAR)
    assert report.captured["0"] == pytest.approx(float(S[:r].norm() / S.norm()), abs=1e-5)
    # The gradient, entry by entry: what is left at full rank is the update itself.
    whole = min(A.shape[1], B.shape[0])
    full = put_on(base_of(v), whole)
    lora_sb.initialize(full, data, lr, count, loss_fn=theirs, progress=False)
    torch.testing.assert_close(
        layer_of(full).get_delta_weight("default"), v["official_dW"], rtol=1e-5, atol=1e-8
    )


def started(v, **options):
    model = put_on(base_of(v), int(v["meta_r"]), init="given", **options)
    start = Start(v["official_A"], v["official_B"], v["official_R0"], 0.0)
    layer_of(model).set_start("default", start)
    return model


def test_the_official_trajectory(official):
    v = official
    model = started(v)
    torch.testing.assert_close(model(v["in_X"][0]), v["official_y0"], **NEAR)
    torch.testing.assert_close(
        layer_of(model).get_delta_weight("default"), v["official_delta"], **NEAR
    )
    (R,) = (p for p in model.parameters() if p.requires_grad)
    optimizer = torch.optim.AdamW([R], lr=float(v["meta_lr"]), weight_decay=0)
    for t in range(12):
        optimizer.zero_grad()
        loss = mean_loss(model, (v["in_X"][t], v["in_T"][t]))
        loss.backward()
        torch.testing.assert_close(loss.detach(), v["official_loss_traj"][t], **NEAR)
        torch.testing.assert_close(R.grad, v["official_gR_traj"][t], **NEAR)
        optimizer.step()
        torch.testing.assert_close(R.detach(), v["official_R_traj"][t], **NEAR)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged[0].weight.detach(), v["official_merged_W"], **NEAR)


@pytest.mark.parametrize("shape", [(9, 14), (14, 9), (11, 11)])
def test_a_step_of_the_core_is_the_projected_gradient(shape):
    torch.manual_seed(0)
    m, n = shape
    base = nn.Sequential(nn.Linear(n, m)).double()
    model = put_on(base, 3)
    x, target = torch.randn(50, n).double(), torch.randn(50, m).double()
    lora_sb.initialize(model, [(x, target)], 1e-3, loss_fn=mean_loss, progress=False)
    layer = layer_of(model)
    weight = layer.base_layer.weight.requires_grad_()
    R, A, B = (getattr(layer, f"lorasb_{name}")["default"] for name in "RAB")
    assert {R.dtype, A.dtype, B.dtype} == {torch.float64}
    # B and A come from a decomposition in float32 of the sum; orthonormal to float64 here.
    A, B = (torch.linalg.qr(t)[0] for t in (A.T, B))
    layer.set_start("default", Start(A.T, B, R.detach(), 0.0))
    A, B = (layer.lorasb_A["default"], layer.lorasb_B["default"])
    G, g = torch.autograd.grad(mean_loss(model, (x, target)), [weight, layer.lorasb_R["default"]])
    torch.testing.assert_close(B @ g @ A, B @ B.T @ G @ A.T @ A, rtol=1e-10, atol=1e-10)


def test_samples_count_alike_however_they_are_batched():
    torch.manual_seed(0)
    x, target = torch.randn(10, 6), torch.randn(10, 4)
    base = nn.Sequential(nn.Linear(6, 4))

    def start(sizes, count=10):
        model = put_on(base, 4)
        data = list(zip(x.split(sizes), target.split(sizes), strict=True))
        found = lora_sb.initialize(model, data, 0.5, count, loss_fn=mean_loss, progress=False)
        assert found.samples == count
        update = layer_of(model).get_delta_weight("default")
        model.unload()
        return update

    base.requires_grad_()
    whole = start([10])
    torch.testing.assert_close(whole, first_update(_gradient(base, x, target), 0.5), **NEAR)
    for sizes in ([4, 4, 2], [1] * 10, [7, 3]):
        torch.testing.assert_close(start(sizes), whole, **NEAR)
    # A batch is cut where it brings more samples than are asked for.
    expected = first_update(_gradient(base, x[:6], target[:6]), 0.5)
    torch.testing.assert_close(start([4, 4, 2], 6), expected, **NEAR)


def _gradient(base, x, target):
    weight = base[0].weight.detach().requires_grad_()
    loss = (nn.functional.linear(x, weight, base[0].bias) - target).square().mean()
    return torch.autograd.grad(loss, weight)[0]


def test_scaling_is_divided_out_and_rows_without_gradient_stay():
    G = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    G[2] = 0
    update = first_update(G, 0.1)
    assert not update[2].any()
    assert (update[3].abs() == 0.1).all()
    for s in (1.0, 4.0):
        start = start_from_update(update, 5, scaling=s)
        torch.testing.assert_close(s * start.B @ start.R @ start.A, update, **NEAR)


def test_large_matrices_are_sketched_with_room(monkeypatch):
    monkeypatch.setattr("fullrank.adapters.lora_sb_start._EXACT", 8)
    G = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    update = first_update(G, 1.0)
    found = start_from_update(update, 6)
    monkeypatch.undo()
    best = start_from_update(update, 6)
    assert found.captured > 0.97 * best.captured
    assert torch.equal(found.A, _sketched(update).A)


def _sketched(update):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fullrank.adapters.lora_sb_start._EXACT", 8)
        return start_from_update(update, 6)


def test_the_weights_own_factors():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(9, 7))
    weight = base[0].weight.detach().clone()
    model = put_on(base, 3, init="xs", seed=5)
    layer = layer_of(model)
    U, S, Vt = torch.linalg.svd(weight)
    found = layer.lorasb_B["default"] @ layer.lorasb_A["default"]
    torch.testing.assert_close(found, U[:, :3] * S[:3] @ Vt[:3], **NEAR)
    R = layer.lorasb_R["default"]
    assert 0 < R.abs().max() < 1e-4
    assert torch.equal(R, start_from_weight(weight, 3, seed=5).R)


def test_only_the_core_is_trained_and_biases_where_asked():
    base = nn.Sequential(nn.Linear(9, 7), nn.Linear(7, 5))
    config = LoraSBConfig(r=4, target_modules=["0", "1"], rank_pattern={"1": 2}, init="xs")
    model = peft.get_peft_model(base, config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16 + 4
    model = put_on(nn.Sequential(nn.Linear(9, 7)), 4, init="xs", bias="lorasb_only")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 16 + 7


def test_an_adapter_without_factors_refuses_to_train(tmp_path):
    base = nn.Sequential(nn.Linear(9, 7))
    x = torch.randn(3, 9)
    expected = base(x)
    model = put_on(base, 4)
    assert torch.equal(model.eval()(x), expected)
    with pytest.raises(InputError, match=r"lora_sb\.initialize"):
        model.train()(x)
    # Factors may come from a file.
    given = put_on(nn.Sequential(nn.Linear(9, 7)), 4, init="xs")
    given.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    model.train()(x).sum().backward()


def test_a_file_needs_no_decomposition_and_says_how_it_is_loaded(tmp_path, monkeypatch):
    model = put_on(nn.Sequential(nn.Linear(9, 7)), 4, init="xs")
    model.save_pretrained(tmp_path)

    def fail(*_):
        raise AssertionError("decomposed")

    monkeypatch.setattr("fullrank.adapters.lora_sb_layer.start_from_weight", fail)
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert (config.init, config.r) == ("given", 4)
    assert "import fullrank.adapters.lora_sb" in (tmp_path / "README.md").read_text()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text().count("import fullrank.adapters.lora_sb") == 1
    peft.PeftModel.from_pretrained(nn.Sequential(nn.Linear(9, 7)), tmp_path)


def test_it_is_an_ordinary_lora_for_other_loaders(tmp_path):
    torch.manual_seed(0)
    x, target = torch.randn(50, 6), torch.randn(50, 4)
    base = nn.Sequential(nn.Linear(6, 4))
    twin = nn.Sequential(nn.Linear(6, 4))
    twin.load_state_dict(base.state_dict())
    model = put_on(base, 3, alpha=6)
    assert layer_of(model).scaling["default"] == 2
    lora_sb.initialize(model, [(x, target)], 0.1, loss_fn=mean_loss, progress=False)
    save_as_lora(model, tmp_path)
    plain = peft.PeftModel.from_pretrained(twin, tmp_path)
    assert plain.peft_config["default"].peft_type == peft.PeftType.LORA
    torch.testing.assert_close(plain(x), model.eval()(x), **NEAR)
    # PEFT's own conversion decomposes the update, which it finds by get_delta_weight.
    config, state = peft.convert_to_lora(model, 3)
    again = peft.get_peft_model(plain.unload(), config)
    peft.set_peft_model_state_dict(again, state)
    torch.testing.assert_close(again(x), model(x), **NEAR)


def test_dropout_falls_on_the_adapter_alone():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 4))
    x = torch.randn(5, 6)
    model = put_on(base, 3, init="given", dropout=0.5, init_weights=False)
    kept, dropped = model.eval()(x), model.train()(x)
    assert not torch.allclose(kept, dropped)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base(x))


def test_dropout_of_the_model_depends_on_the_seed_alone():
    x, target = torch.randn(50, 6), torch.randn(50, 4)

    def start(seed):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5)).eval()
        model = put_on(base, 3)
        state = torch.get_rng_state()
        torch.manual_seed(torch.randint(1000, ()).item())
        before = torch.get_rng_state()
        lora_sb.initialize(model, [(x, target)], 0.1, loss_fn=mean_loss, seed=seed, progress=False)
        assert torch.equal(torch.get_rng_state(), before)
        torch.set_rng_state(state)
        assert not base.training
        return layer_of(model).lorasb_A["default"]

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


DATA = [(torch.randn(8, 9), torch.randn(8, 7))]
NAN = [(torch.full((8, 9), float("nan")), torch.randn(8, 7))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataloader": []}, "has 0 samples, fewer than n_samples=8"),
        ({"n_samples": 50}, "has 8 samples, fewer than n_samples=50"),
        ({"n_samples": 0}, "n_samples=0"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"dataloader": NAN}, "loss of batch 1 is nan"),
        ({"adapter": "other"}, "no LoRA-SB adapter 'other'"),
        ({"dataloader": [(torch.zeros(8, 9), DATA[0][1])]}, "gradient of 0 is zero"),
        ({"loss_fn": lambda model, batch: model(batch[0]).sum() * 0}, "gradient of 0 is zero"),
    ],
)
def test_bad_input_leaves_the_adapter_as_it_was(options, message):
    model = put_on(nn.Sequential(nn.Linear(9, 7)), 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = {"dataloader": DATA, "lr": 0.1, "n_samples": 8, "loss_fn": mean_loss, **options}
    with pytest.raises(InputError, match=message):
        lora_sb.initialize(model, progress=False, **arguments)
    assert all(torch.equal(model.state_dict()[name], t) for name, t in before.items())
    assert not layer_of(model).started["default"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r=0"),
        ({"r": 4, "rank_pattern": {"0": -1}}, "r=-1"),
        ({"r": 8}, "0 is 7 x 9: a rank of 8 is above 7"),
        ({"r": 4, "rank_pattern": {"0": 8}}, "a rank of 8 is above 7"),
        ({"r": 4, "init": "svd"}, "init='svd'"),
        ({"r": 4, "core_dtype": "int8"}, "core_dtype"),
        ({"r": 4, "bias": "some"}, "bias"),
        ({"r": 4, "alpha": -1}, "alpha"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(InputError, match=message):
        put_on(nn.Sequential(nn.Linear(9, 7)), **options)


def test_types():
    base = nn.Sequential(nn.Linear(9, 7)).bfloat16()
    model = put_on(base, 4, init="given", init_weights=False)
    layer = layer_of(model)
    assert {t.dtype for t in layer.lorasb_A.values()} == {torch.float32}
    narrow = put_on(nn.Sequential(nn.Linear(9, 7)), 4, init="xs", core_dtype=torch.bfloat16)
    assert layer_of(narrow).lorasb_R["default"].dtype == torch.bfloat16
    assert narrow(torch.randn(2, 9)).dtype == torch.float32


class Quantised(nn.Linear):
    """A layer whose weight is packed integers, as bitsandbytes' and others' are."""

    def __init__(self):
        super().__init__(9, 7)
        self.full = self.weight.detach().clone()
        packed = torch.zeros(32, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.full, self.bias)


def test_a_quantised_base_takes_factors_but_gives_none():
    for init in ("update", "xs"):
        with pytest.raises(InputError, match="0 is a Quantised"):
            put_on(nn.Sequential(Quantised()), 4, init=init)
    with pytest.raises(InputError, match="quantised"):
        adapt(nn.Sequential(Quantised()), "lora_sb", rank=4, data=DATA, lr=0.1)
    model = put_on(nn.Sequential(Quantised()), 4, init="given", init_weights=False)
    x = DATA[0][0]
    model(x).sum().backward()
    assert not torch.allclose(model(x), model.get_base_model()[0].base_layer(x))
    with pytest.raises(InputError, match="quantised"):
        model.merge_adapter()


def test_running_means_are_not_those_of_the_calibration():
    base = nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7)).eval()
    before = {name: b.clone() for name, b in base[1].named_buffers()}
    model = put_on(base, 4)
    lora_sb.initialize(model, DATA, 0.1, 8, loss_fn=mean_loss, progress=False)
    assert all(torch.equal(b, before[name]) for name, b in base[1].named_buffers())
    assert not base[1].training


def test_adapt_needs_the_first_steps_rate():
    with pytest.raises(InputError, match="LoRA-SB needs lr"):
        adapt(nn.Sequential(nn.Linear(9, 7)), "lora_sb", rank=4, data=DATA)


def test_it_learns_more_than_lora_xs_with_as_many_numbers():
    """Digits, turned by 90 degrees, on a network that knows them upright; as in benchmarks/."""
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    labels = torch.tensor(load_digits().target)
    upright, turned = images.flatten(1), images.rot90(1, (1, 2)).flatten(1)

    def fit(model, x, lr, steps):
        generator = torch.Generator().manual_seed(0)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        losses = []
        for _ in range(steps):
            rows = torch.randint(len(x), (64,), generator=generator)
            loss = nn.functional.cross_entropy(model(x[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses[-20:]) / 20

    def loss_fn(model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1])

    for seed in range(2):
        torch.manual_seed(seed)
        base = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        fit(base, upright, 3e-3, 300)
        final = {}
        for init in ("xs", "update"):
            found = []
            for lr in (0.03, 0.1):
                config = LoraSBConfig(r=8, target_modules=["0", "2"], init=init, seed=seed)
                model = peft.get_peft_model(copy.deepcopy(base), config)
                if init == "update":
                    data = [(turned[:50], labels[:50])]
                    lora_sb.initialize(model, data, 3e-3, loss_fn=loss_fn, progress=False)
                found.append(fit(model, turned, lr, 120))
            final[init] = min(found)
        assert final["update"] < final["xs"]
