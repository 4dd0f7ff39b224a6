"""Spectra of what flows through modules: any pattern, padding left out, summed over processes."""

import pytest
import torch
from torch import nn
from two_processes import process_group

from fullrank.core.errors import InputError
from fullrank.spectra import ActivationMeter, Spectrum, activation_spectra


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attention = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x), None


class Model(nn.Module):
    """Tokens in, a tuple out, as transformers' layers give."""

    def __init__(self, words=40, width=8, depth=2):
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.layer = nn.ModuleList(Block(width) for _ in range(depth))
        self.dropout = nn.Dropout(0.5)
        self.pooler = nn.Linear(width, width)

    def forward(self, input_ids, attention_mask=None):
        x = self.words(input_ids)
        for block in self.layer:
            x, _ = block(x)
        return {"last": self.dropout(x), "pooled": self.pooler(x[:, 0])}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


def padded(rows=6, length=9):
    ids = torch.randint(0, 40, (rows, length), generator=torch.Generator().manual_seed(1))
    mask = torch.arange(length) < torch.tensor([9, 3, 5, 9, 1, 7])[:rows, None]
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.filterwarnings("ignore:1 of 7 modules, e.g. pooler")
def test_layers_embeddings_and_hidden_states(model):
    batch = padded()
    real = batch["attention_mask"].bool()
    found = activation_spectra(model, [batch], ["words", "layer.?", "layer.*.mlp", "pooler", ""])
    assert list(found) == [
        "",
        "words",
        "layer.0",
        "layer.0.mlp",
        "layer.1",
        "layer.1.mlp",
        "pooler",
    ]
    model.eval()
    with torch.no_grad():
        words = model.words(batch["input_ids"])
        first, _ = model.layer[0](words)
        out = model(**batch)
    for name, expected in {
        "words": words[real],
        "layer.0": first[real],
        "": out["last"][real],
        "pooler": out["pooled"],
    }.items():
        values = Spectrum(expected).values
        assert found[name].values == pytest.approx(values, rel=1e-6, abs=1e-6), name


def test_batches_and_padding_do_not_matter(model):
    batch = padded()
    whole = activation_spectra(model, [batch], "layer.*", center=True)
    noisy = dict(batch)
    noisy["input_ids"] = torch.where(batch["attention_mask"] > 0, batch["input_ids"], 39)
    alone = [
        {"input_ids": ids[mask > 0][None]}
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]
    for batches in ([noisy], alone):
        again = activation_spectra(model, batches, "layer.*", center=True)
        for name, spectrum in whole.items():
            assert again[name].values == pytest.approx(spectrum.values, rel=1e-5, abs=1e-5)


def test_a_meter_watches_training_and_lets_go(model):
    meter = ActivationMeter(model, "layer.*.mlp", side="input")
    model.train()
    batch = padded()
    for _ in range(2):
        with meter:
            model(**batch)["pooled"].sum().backward()
    model(**batch)
    tokens = int(batch["attention_mask"].sum())
    assert {name: meter[name].count for name in meter} == dict.fromkeys(
        ["layer.0.mlp", "layer.1.mlp"], 2 * tokens
    )
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    again = ActivationMeter(model, "layer.*.mlp", side="input")
    again.load_state_dict(meter.state_dict())
    assert again.spectra() == meter.spectra()
    with pytest.raises(InputError, match="not watched"):
        ActivationMeter(model, "words").load_state_dict(meter.state_dict())
    meter.reset()
    with pytest.raises(InputError, match="none of the chosen modules ran"):
        meter.spectra()


def test_names_under_wrappers_and_a_mask_by_mapping(model):
    class Sentences(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.module = inner

        def forward(self, features):
            return self.module(**features)

    meter = ActivationMeter(Sentences(model), "layer.0")
    with meter:
        meter._model(padded())
    assert list(meter) == ["layer.0"]
    assert meter["layer.0"].count == int(padded()["attention_mask"].sum())


def test_a_mask_by_place(model):
    batch = padded()
    one = activation_spectra(model, [batch], "layer.1")
    two = activation_spectra(model, [(batch["input_ids"], batch["attention_mask"])], "layer.1")
    assert one == two


def test_what_is_computed_again_for_the_backward_pass_counts_once(model):
    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.inner.layer[0], x, use_reentrant=False)[0]

    with ActivationMeter(Checkpointed(), "*.mlp") as meter:
        meter._model(torch.randn(4, 5, 8)).sum().backward()
    assert meter["inner.layer.0.mlp"].count == 20


def test_a_decoders_tokens_are_masked_by_its_own_mask():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1}
    model = transformers.T5Model(transformers.T5Config(num_heads=2, **sizes))
    ids = torch.randint(1, 50, (6, 9), generator=torch.Generator().manual_seed(0))
    mask, decoder_mask = (torch.arange(9) < n for n in (4, 7))
    given = {"input_ids": ids, "attention_mask": mask.expand(6, 9), "decoder_input_ids": ids}
    names = ["encoder.block.0.layer.0.SelfAttention.k", "decoder.block.0.layer.0.SelfAttention.k"]
    names += [f"decoder.block.0.layer.1.EncDecAttention.{part}" for part in "qk"]

    def counted(**more):
        with ActivationMeter(model, names) as meter, torch.no_grad():
            model(**given, **more)
        return [meter[name].count for name in names]

    assert counted() == [24, 54, 54, 24]
    assert counted(decoder_attention_mask=decoder_mask.expand(6, 9)) == [24, 42, 42, 24]
    given["decoder_input_ids"] = ids[:, :5]
    assert counted() == [24, 30, 30, 24]


def test_channels_of_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU())
    images = torch.randn(4, 3, 6, 6)
    found = activation_spectra(model, [images], ["0", "1"])
    expected = model[0](images).movedim(1, -1).reshape(-1, 5)
    assert found["0"].values == pytest.approx(Spectrum(expected).values, rel=1e-6)
    assert len(found["1"]) == 5


def test_shapes_that_a_mask_can_and_cannot_be_read_in():
    class Odd(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.inner = nn.Identity()
            self.change = change

        def forward(self, x, attention_mask=None):
            return self.inner(self.change(x))

    x, mask = torch.randn(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    real = x[mask.bool()]

    def run(change, mask=mask):
        batch = {"x": x, "attention_mask": mask}
        return activation_spectra(Odd(change), [batch], "inner", side="input")["inner"].values

    flat = run(lambda x: x.reshape(10, 8))
    assert flat == pytest.approx(Spectrum(real).values, rel=1e-6)
    heads = run(lambda x: x.reshape(2, 5, 2, 4).transpose(1, 2))
    assert heads == pytest.approx(Spectrum(real.reshape(-1, 4)).values, rel=1e-6)
    by_head = run(lambda x: x.reshape(2, 5, 2, 4))
    assert by_head == pytest.approx(heads, rel=1e-6)
    positions_first = run(lambda x: x.transpose(0, 1).contiguous())
    assert positions_first == pytest.approx(flat, rel=1e-6)
    for change in (lambda x: x[:, :3], lambda x: x[:, :3].transpose(0, 1)):
        with pytest.raises(InputError, match="do not line up"):
            run(change)
    assert len(run(lambda x: x[:, :4], torch.ones_like(mask))) == 8


def test_generation_goes_on_from_a_padded_prompt():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    batch = {"input_ids": torch.randint(3, 40, (2, 6)), "attention_mask": torch.ones(2, 6).long()}
    batch["attention_mask"][0, :2] = 0
    with ActivationMeter(model, "model.norm") as meter:
        model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    assert meter["model.norm"].count == 10 + 2 * 3  # the last token is not read


@pytest.mark.filterwarnings("ignore:.*their spectrum has at most")
def test_wide_outputs_are_sketched():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 90, bias=False))
    x = torch.randn(60, 6)
    found = activation_spectra(model, x.split(20), "0", exact_to=64, sketch=16)["0"]
    expected = Spectrum(model(x).detach())
    assert len(found) == 16
    assert found.missed < 1e-9 * expected.frobenius_norm**2
    assert found.values[:6] == pytest.approx(expected.values[:6], rel=1e-6)


@pytest.mark.parametrize(
    ("modules", "options", "says"),
    [
        ("layer.*.ffn", {}, "no module matches 'layer..\\.ffn'; there are words"),
        ([], {}, "no modules were chosen"),
        ("words", {"side": "both"}, "side"),
    ],
)
def test_what_cannot_be_watched(model, modules, options, says):
    with pytest.raises(InputError, match=says):
        activation_spectra(model, [padded()], modules, **options)


def test_values_that_are_not_finite_are_placed(model):
    with torch.no_grad():
        model.layer[1].attention.bias[2] = float("inf")
    with pytest.raises(InputError, match=r"output of layer\.1\.attention: .*NaN or infinite"):
        activation_spectra(model, [padded()], "*attention")
    with pytest.raises(InputError, match="none of the chosen modules ran"):
        activation_spectra(model, [], "words")
    with pytest.warns(UserWarning, match=r"1 of 1 modules, e.g. words: 6 samples of width 8"):
        activation_spectra(model, [{"input_ids": torch.arange(6)[None]}], "words")


def _worker(rank, folder, batches, results):
    with process_group(folder, rank):
        torch.manual_seed(0)
        model = nn.parallel.DistributedDataParallel(Model())
        found = activation_spectra(model, batches[rank], "layer.?", across_processes=True)
        results[rank] = {name: spectrum.values for name, spectrum in found.items()}


def test_samples_of_all_processes_count(tmp_path):
    batch = padded()
    batches = [
        [{name: tensor[:2] for name, tensor in batch.items()}],
        [{name: tensor[2:] for name, tensor in batch.items()}],
    ]
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        torch.multiprocessing.spawn(_worker, (str(tmp_path), batches, results), nprocs=2)
        found = [results[0], results[1]]
    torch.manual_seed(0)
    expected = activation_spectra(Model(), [batch], "layer.?")
    for values in found:
        assert list(values) == ["layer.0", "layer.1"]
        for name, spectrum in expected.items():
            assert values[name] == pytest.approx(spectrum.values, rel=1e-5)
